"""Reference images of the retrieval-augmented model, in its context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.adapters.image_encoder import open_image_encoder
from models.checkpoint import load
from models.conditioning.conditioner import ConditioningInput
from models.latent_diffusion import to_uint8
from service.device.loading import build
from service.device.runner import TorchRunner
from service.engine.job import Job
from service.errors import InvalidRequest
from service.requests.resolve import resolve
from service.requests.schemas import GenerateRequest
from service.settings import Settings
from tests.checkpoints.ip_files import write_image_encoder
from tests.checkpoints.ldm_models import CONTEXT, write
from tests.helpers.images import png
from tests.helpers.torch_runner import run_jobs

PIXELS = np.random.default_rng(3).integers(0, 256, (2, 40, 52, 3), np.uint8)
SETTINGS = {"device": "cpu", "dtype": "float32", "invariant": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write(folder, "rdm768"), write_image_encoder(folder / "encoder", CONTEXT)


@pytest.fixture(scope="module")
def runner(files) -> TorchRunner:
    model, encoder = files
    return build(Settings(**SETTINGS, image_encoder=(str(encoder),)), {"rdm": model})


def job(runner: TorchRunner, count: int, name: str = "a", **changes) -> Job:
    data = [png(pixels) for pixels in PIXELS[:count]]
    images = [{"adapter": "neighbours", "image": image} | changes for image in data]
    body = {"prompt": "apple", "width": 128, "height": 128, "steps": 3, "seed": 4, "guidance_scale": 3.0}
    request = GenerateRequest.model_validate(body | ({"reference_images": images} if images else {}))
    return replace(resolve(request, runner.specs, Settings()).to_job(), id=name)


@torch.inference_mode()
def test_images_are_vectors_in_the_context_while_other_jobs_run(runner, files):
    assert runner.specs["rdm"].reference_adapters == ("neighbours",)
    images = run_jobs(runner, job(runner, 2), job(runner, 2, "b"), job(runner, 0, "c"), job(runner, 1, "d"))
    model, encoder = load(files[0]), open_image_encoder(files[1])
    for name, count in (("a", 2), ("b", 2), ("c", 0), ("d", 1)):
        pixels = [torch.from_numpy(each).movedim(-1, 0)[None] / 255 for each in PIXELS[:count]]
        vectors = torch.cat([encoder.neighbours(each) for each in pixels]) if pixels else None
        (x,) = model.sample([ConditioningInput("apple", neighbours=vectors)], [4], 3, 3.0, size=(128, 128))
        wanted = to_uint8(x).movedim(0, -1).numpy().astype(int)
        ours = np.frombuffer(images[name][0], np.uint8).reshape(wanted.shape)
        assert np.abs(ours - wanted).max() <= 1
    assert images["a"] == images["b"]
    assert len({images["a"], images["c"], images["d"]}) == 3


@pytest.mark.parametrize(("field", "value"), [("scale", 0.5), ("start", 0.1), ("end", 0.9)])
def test_a_neighbour_has_no_scale_and_no_window(runner, field, value):
    with pytest.raises(InvalidRequest, match=r"must be [01] for neighbours") as refused:
        job(runner, 1, **{field: value})
    assert refused.value.param == f"reference_images.0.{field}"


def test_models_without_an_encoder_of_their_width_take_none(files, tiny, tmp_path):
    narrow = write_image_encoder(tmp_path / "narrow", CONTEXT + 8)
    settings = Settings(**SETTINGS, image_encoder=(str(narrow),))
    for runner in (
        build(settings, {"rdm": files[0]}),
        build(Settings(**SETTINGS), {"rdm": files[0], "t": tiny}),
    ):
        assert all(spec.reference_adapters == () for spec in runner.specs.values())

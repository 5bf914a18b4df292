"""Label maps and mask channels on the runner: what the UNet gets as concat channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load, save
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.job import ImageKey, Job
from tests.checkpoints.tiny import random_model, scene_spec
from tests.helpers.fake_runner import make_job
from tests.helpers.images import IMAGE, MASK, psnr
from tests.helpers.torch_runner import begin, decoded, left


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "scene"
    save(random_model(scene_spec()), folder, torch.float32)
    return folder


@pytest.fixture
def runner(scene: Path) -> TorchRunner:
    return TorchRunner(Registry({"m": scene}, load), buckets=(2, 4, 8))


def scene_job(name: str = "a", **changes) -> Job:
    return make_job(name, **({"width": 64, "height": 64} | changes))


def regions(number: int) -> bytes:
    return np.full((8, 8), number, np.uint16).tobytes()


def finished(runner: TorchRunner, *jobs: Job) -> list[bytes]:
    """The images of jobs that run together."""
    for job in jobs:
        begin(runner, job)
    while running := [job for job in jobs if left(runner, job)]:
        runner.step([ImageKey(job.id, 0) for job in running])
    return [decoded(runner, ImageKey(job.id, 0)) for job in jobs]


def test_a_saved_model_is_loaded_with_its_labels_and_layout(scene):
    bundle, expected = load(scene), random_model(scene_spec())
    assert bundle.spec == scene_spec()
    regions = torch.tensor([[0, 1], [2, 3]])
    assert torch.equal(bundle.conditioner.from_regions(regions), expected.conditioner.from_regions(regions))


def test_guidance_changes_nothing_without_conditions(runner):
    guided, plain = (scene_job(f"{scale}", prompt="", guidance_scale=scale) for scale in (3.0, 1.0))
    first, second = finished(runner, guided, plain)
    assert psnr(first, second) > 50


def test_all_tasks_share_one_call_and_change_no_other_image(runner):
    jobs = [
        scene_job("a"),
        scene_job("b", image=IMAGE.tobytes(), strength=0.7, guidance_scale=1.0),
        scene_job("c", image=IMAGE.tobytes(), mask=MASK.tobytes(), steps=4),
        scene_job("d", regions=regions(2), eta=1.0),
        scene_job("e", image=IMAGE.tobytes(), mask=MASK.tobytes(), regions=regions(1), prompt=""),
    ]
    groups = {segment.group for job in jobs for segment in runner.shape(job).segments}
    assert len(groups) == 1
    together = finished(runner, *jobs)
    for job, image in zip(jobs, together, strict=True):
        (alone,) = finished(TorchRunner(runner.registry, runner.buckets), job)
        assert psnr(alone, image) > 40


def test_the_null_condition_has_the_same_mask_and_no_regions(runner):
    job = scene_job(image=IMAGE.tobytes(), mask=MASK.tobytes(), regions=regions(2))
    begin(runner, job)
    null, condition = runner.jobs["a"].images[0].concat
    assert null.shape == (1 + 4 + 3, 8, 8)
    assert torch.equal(null[:5], condition[:5])
    assert not null[5:].any()
    assert condition[5:].any()


def test_mask_channels_hold_the_mask_and_the_latent_of_the_masked_image(runner):
    begin(runner, scene_job(image=IMAGE.tobytes(), mask=MASK.tobytes()))
    state, bundle = runner.jobs["a"], runner.registry["m"]
    x = torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 127.5 - 1
    z = bundle.encode(torch.where(torch.from_numpy(MASK >= 128), 0.0, x))[0]
    assert state.mask is None  # nothing is blended
    assert torch.equal(state.images[0].concat[0, 0].nonzero().min(0).values, torch.tensor([2, 3]))
    assert torch.allclose(state.images[0].concat[0, 1:5], z, atol=1e-5)


def test_without_a_mask_every_pixel_is_repainted(runner):
    begin(runner, scene_job(guidance_scale=1.0))
    _, row = runner.jobs["a"].images[0].concat
    assert (row[0] == 1).all()
    assert torch.equal(row[1:5], runner.registry["m"].encode(torch.zeros(1, 3, 64, 64))[0])


@pytest.mark.parametrize("changes", [{"regions": regions(3)}, {"prompt": "q"}, {"mask": MASK.tobytes()}])
def test_every_condition_changes_the_image(runner, changes):
    base = {
        "image": IMAGE.tobytes(),
        "regions": regions(1),
        "mask": np.full((64, 64), 255, np.uint8).tobytes(),
    }
    first, second = finished(runner, scene_job("a", **base), scene_job("b", **(base | changes)))
    assert psnr(first, second) < 40

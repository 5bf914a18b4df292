"""Models of the latent diffusion paper over HTTP, from single files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from models.checkpoint import load
from models.networks.autoencoder import Autoencoder
from service.cli.main import main
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.events import Done
from service.requests.resolve import resolve
from service.requests.response import Result
from service.settings import Settings
from tests.checkpoints.ldm_models import FIRST_STAGES, thin
from tests.helpers.clients import error_of, image_of
from tests.helpers.images import IMAGE, MASK, psnr
from tests.helpers.ldm_requests import BODIES, TASKS, schema_of
from tests.helpers.servers import Server, wait_until
from tests.helpers.torch_runner import run_together

SERVED = ("celebahq", "cin256-v2", "layout2img", "semantic_synthesis", "inpainting_big", "bsr_sr")
PATHS = {"inpainting_big": "/inpaint", "bsr_sr": "/upscale"}
SIZED = ("celebahq", "cin256-v2", "layout2img", "semantic_synthesis")


def body_of(name: str, **changes) -> dict:
    size = {"width": 64, "height": 64} if name in SIZED else {}
    return {"model": name, "seed": 5, "steps": 3} | size | BODIES[name] | changes


def ask(server: Server, name: str, **changes):
    return server.client.post(PATHS.get(name, "/generate"), json=body_of(name, **changes))


def here(ldm_files: dict[str, Path], name: str) -> np.ndarray:
    """The same request on an engine in this process."""
    runner = TorchRunner(Registry({name: ldm_files[name]}, load), buckets=(2, 4, 8))
    resolved = resolve(schema_of(name).model_validate(body_of(name)), runner.specs, Settings())
    (images,), _ = run_together(runner, resolved.to_job())
    return Result(resolved, Done(resolved.id, tuple(images), (), 0, 0, 0)).pixels(0)


@pytest.mark.parametrize("name", SERVED)
def test_an_image_is_the_one_that_the_engine_makes(families, ldm_files, name):
    pixels = image_of(ask(families, name))
    assert psnr(pixels, here(ldm_files, name)) > 40
    if name == "inpainting_big":
        assert (pixels[MASK == 0] == IMAGE[MASK == 0]).all()
        assert (pixels[MASK > 0] != IMAGE[MASK > 0]).any()
    if name == "bsr_sr":
        assert pixels.shape == (4 * 16, 4 * 24, 3)


def test_requests_to_all_models_at_once(families):
    with ThreadPoolExecutor(12) as pool:
        responses = [pool.submit(ask, families, name, n=2) for name in (*SERVED, *SERVED)]
        assert [each.result().status_code for each in responses] == [200] * 12


def test_each_model_is_listed_with_its_tasks_and_inputs(families):
    listed = {model["name"]: model for model in families.client.get("/models").json()["models"]}
    for name in SERVED:
        model = listed[name]
        found = (model["tasks"], model["inputs"], model["guided"], model["label_count"])
        assert found == TASKS[name]
    assert [label["name"] for label in listed["semantic_synthesis"]["labels"][:2]] == ["0", "1"]
    assert listed["cin256-v2"]["labels"] == []
    assert listed["bsr_sr"]["upscaling"] == {"scale": 4, "max_noise_level": 0}


@pytest.mark.parametrize(
    ("name", "changes", "param"),
    [
        ("celebahq", {"prompt": "a face"}, "prompt"),
        ("celebahq", {"guidance_scale": 2.0}, "guidance_scale"),
        ("celebahq", {"class_label": 1}, "class_label"),
        ("cin256-v2", {"class_label": 1000}, "class_label"),
        ("cin256-v2", {"class_label": None}, "class_label"),
        ("layout2img", {"boxes": []}, "boxes"),
        ("semantic_synthesis", {"width": 128}, "segmentation"),
        ("bsr_sr", {"noise_level": 1}, "noise_level"),
    ],
)
def test_an_unsupported_input_is_refused_by_name(families, name, changes, param):
    assert error_of(ask(families, name, **changes), 422)["param"] == param


def test_the_model_of_a_request_that_names_none_is_the_first_that_does_the_task(families):
    for name in ("celebahq", "inpainting_big", "bsr_sr"):
        response = ask(families, name, model=None)
        assert response.json()["model"] == name


def test_a_class_conditional_job_reports_its_steps(families):
    request = {"task": "generate", "request": body_of("cin256-v2"), "preview_every": 1}
    path = families.client.post("/jobs", json=request).headers["location"]
    wait_until(lambda: families.client.get(path).json()["status"] not in ("queued", "running"))
    status = families.client.get(path).json()
    assert (status["status"], status["step"]) == ("done", 3)


def test_an_autoencoder_alone_is_refused(tmp_path, capsys):
    file = tmp_path / "vq-f4.safetensors"
    save_file(Autoencoder(thin(FIRST_STAGES["vq-f4"])).state_dict(), file)
    assert main(["generate", "--model", str(file), "-o", str(tmp_path / "x.png")]) == 2
    assert "vq-f4 is a VAE alone" in capsys.readouterr().err

"""POST /upscale: how a request is resolved, how it runs in tiles, and its response."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from models.checkpoint import load, save
from models.latent_diffusion import to_uint8
from service.errors import InvalidRequest, NotFound
from service.requests.resolve import resolve
from service.requests.schemas import GenerateRequest, UpscaleRequest
from service.settings import Settings
from tests.checkpoints.tiny import random_model, tiny_spec, upscaler_spec
from tests.helpers.clients import error_of, image_of
from tests.helpers.images import base64_of, noise, psnr
from tests.helpers.servers import Server, wait_until

SIZE = (45, 30)  # multiples of nothing; several tiles in each direction
SPECS = {"tiny": tiny_spec(), "upscaler": upscaler_spec()}


def body_of(**changes) -> dict:
    return {"image": base64_of(noise(*SIZE)), "seed": 1} | changes


def order(**changes):
    return resolve(UpscaleRequest(**body_of(**changes)), SPECS, Settings())


def test_the_canvas_is_padded_to_a_size_of_the_unet_and_the_result_is_four_times_the_image():
    made = order()
    assert (made.canvas_width, made.canvas_height) == (4 * 46, 4 * 30)
    assert (made.width, made.height) == (180, 120)
    assert len(made.inputs.image) == 46 * 30 * 3
    assert (made.task, made.model_scale, made.parameters.noise_level) == ("upscaling", 4, 2)
    assert len(made.tiles.corners) == 4 * 3


def test_the_default_model_is_the_first_that_upscales():
    assert order().parameters.model == "upscaler"
    assert resolve(GenerateRequest(prompt="p"), SPECS, Settings()).parameters.model == "tiny"


def test_parameters_are_those_of_the_request_without_its_image():
    parameters = order(scale=2, noise_level=0).parameters.of_image(1)
    assert (parameters["scale"], parameters["noise_level"], parameters["seed"]) == (2, 0, 2)
    assert set(parameters) <= set(UpscaleRequest.model_fields)
    json.dumps(parameters)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": "tiny"}, "model"),
        ({"scale": 5}, "scale"),
        ({"noise_level": 10}, "noise_level"),
        ({"prompt": "a cat"}, "prompt"),
        ({"negative_prompt": "a cat"}, "negative_prompt"),
        ({"guidance_scale": 3.0}, "guidance_scale"),
        ({"image": "????"}, "image"),
        ({"sampler": "?"}, "sampler"),
        ({"steps": 1000, "n": 16, "image": base64_of(noise(1000, 800))}, "image"),
        ({"image": base64_of(noise(2100, 2000))}, "image"),
        ({"image": base64_of(noise(4100, 1)), "output_format": "webp"}, "output_format"),
        ({"image": base64_of(noise(16_380, 1)), "output_format": "jpeg"}, "output_format"),
    ],
)
def test_an_unsupported_value_is_refused_by_its_field(changes, param):
    with pytest.raises(InvalidRequest) as refused:
        order(**changes)
    assert refused.value.param == param


def test_a_model_that_does_not_upscale_is_refused():
    with pytest.raises(InvalidRequest, match="must support upscaling"):
        resolve(UpscaleRequest(**body_of()), {"tiny": tiny_spec()}, Settings())
    with pytest.raises(NotFound):
        order(model="?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "upscaler"
    save(random_model(upscaler_spec()), path)
    return path


@pytest.fixture(scope="module")
def upscaler(start_server, folder) -> Iterator[Server]:
    with start_server(folder) as server:
        yield server


def enlarged(server: Server, **changes) -> np.ndarray:
    return image_of(server.client.post("/upscale", json=body_of(**changes)))


def test_any_size_gives_the_image_of_the_model_itself_four_times_as_large(upscaler, folder):
    pixels = enlarged(upscaler, steps=3)
    assert pixels.shape == (120, 180, 3)
    canvas = np.pad(np.asarray(noise(*SIZE)), ((0, 0), (0, 1), (0, 0)), mode="edge")
    low = torch.from_numpy(canvas).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        x = load(folder).upscale(low, [1], 3, noise_level=2)
    expected = to_uint8(x[0]).permute(1, 2, 0).numpy()[:120, :180]
    assert psnr(pixels, expected) > 40


def test_a_smaller_scale_is_the_same_image_resized(upscaler):
    whole, half = enlarged(upscaler), enlarged(upscaler, scale=2)
    assert half.shape == (60, 90, 3)
    assert (np.asarray(Image.fromarray(whole).resize((90, 60), Image.Resampling.LANCZOS)) == half).all()


def test_every_image_has_its_own_seed_and_other_jobs_change_nothing(upscaler):
    two = upscaler.client.post("/upscale", json=body_of(n=2))
    images = two.json()["images"]
    assert [image["seed"] for image in images] == [1, 2]
    assert (images[0]["width"], images[0]["height"]) == (180, 120)
    assert psnr(image_of(two, 1), enlarged(upscaler, seed=2)) > 40
    alone = enlarged(upscaler, seed=2, sampler="euler_ancestral")
    others = [{"seed": seed, "steps": 2 + seed, "noise_level": seed % 3} for seed in range(3, 8)]
    with ThreadPoolExecutor(6) as pool:
        responses = [pool.submit(enlarged, upscaler, **changes) for changes in others]
        again = enlarged(upscaler, seed=2, sampler="euler_ancestral")
        assert all(each.result().shape == (120, 180, 3) for each in responses)
    assert psnr(alone, again) > 40
    assert psnr(alone, enlarged(upscaler, seed=3, sampler="euler_ancestral")) < 40


def test_the_parameters_of_an_image_reproduce_it(upscaler):
    body = body_of(noise_level=1)
    response = upscaler.client.post("/upscale", json=body, headers={"Accept": "image/png"})
    assert response.headers["content-type"] == "image/png"
    file = Image.open(io.BytesIO(response.content))
    again = body_of() | json.loads(file.text["parameters"])
    assert (
        upscaler.client.post("/upscale", json=again, headers={"Accept": "image/png"}).content
        == response.content
    )


def test_a_job_counts_the_steps_of_every_tile(upscaler):
    request = {"task": "upscale", "request": body_of(steps=3)}
    path = upscaler.client.post("/jobs", json=request).headers["location"]
    wait_until(lambda: upscaler.client.get(path).json()["status"] not in ("queued", "running"))
    status = upscaler.client.get(path).json()
    assert (status["status"], status["task"]) == ("done", "upscale")
    assert status["step"] == status["steps"] == 3 * 12
    assert status["result"]["images"][0]["width"] == 180
    refused = upscaler.client.post("/jobs", json=request | {"preview_every": 1})
    assert error_of(refused, 422)["param"] == "preview_every"


def test_the_model_is_listed_and_refuses_other_tasks(upscaler):
    (model,) = upscaler.client.get("/models").json()["models"]
    assert model["upscaling"] == {"scale": 4, "max_noise_level": 9}
    assert (model["tasks"], model["inpainting"], model["defaults"]["noise_level"]) == (["upscaling"], None, 2)
    assert error_of(upscaler.client.post("/generate", json={"prompt": "p"}), 422)["param"] == "model"


def test_a_killed_worker_gives_the_same_image_again(upscaler):
    expected = enlarged(upscaler, steps=30)
    with ThreadPoolExecutor(1) as pool:
        responses = pool.submit(enlarged, upscaler, steps=30)
        before = upscaler.calls()
        wait_until(lambda: upscaler.calls() > before)
        upscaler.kill_worker()
        assert psnr(responses.result(), expected) > 40

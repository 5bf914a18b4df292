"""Stable Diffusion's single files over HTTP: one server of a file of each kind, as `ldm serve` starts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load
from models.conditioning.conditioner import ConditioningInput
from models.latent_diffusion import pixels_last, to_uint8
from tests.checkpoints import sd_files
from tests.helpers.clients import image_of
from tests.helpers.images import base64_of, hole, noise, psnr
from tests.helpers.servers import Server

SERVED = ("sd1", "sd1-inpainting", "sd2", "sd-x4", "sdxl")
ASKED = {"prompt": "red apple", "negative_prompt": "blue", "seed": 5, "steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    rows = {name: sd_files.narrow(sd_files.ROWS[name]) for name in SERVED}
    return {name: sd_files.write(folder, name, row, sd_files.reference(row)) for name, row in rows.items()}


@pytest.fixture(scope="module")
def server(start_server, files) -> Iterator[Server]:
    with start_server(*files.values(), LDM_PREDICTION="epsilon") as server:
        yield server


def ask(server: Server, name: str, path: str = "/generate", **changes) -> np.ndarray:
    return image_of(server.client.post(path, json={"model": name} | ASKED | changes))


def bytes_of(x: torch.Tensor) -> np.ndarray:
    return pixels_last(to_uint8(x))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@torch.inference_mode()
def test_a_prompt_gives_what_the_models_own_arithmetic_has(server, files, name):
    """SDXL is told the size; what Stable Diffusion 2 predicts is told by LDM_PREDICTION."""
    pixels = ask(server, name, width=64, height=128)
    model = load(files[name], prediction="epsilon")
    x = model.sample([ConditioningInput("red apple", "blue")], [5], 2, 3.0, size=(64, 128))
    assert pixels.shape == (128, 64, 3)
    assert psnr(pixels, bytes_of(x[0])) > 40


def test_what_a_mask_hides_is_painted(server):
    size = (64, 64)
    pictures = {"image": base64_of(noise(*size)), "mask": base64_of(hole(size))}
    pixels, before, mask = ask(server, "sd1-inpainting", "/inpaint", **pictures), noise(*size), hole(size)
    kept = np.asarray(mask) == 0
    assert (pixels[kept] == np.asarray(before)[kept]).all()
    assert (pixels[~kept] != np.asarray(before)[~kept]).any()


@torch.inference_mode()
def test_a_picture_comes_back_four_times_as_large(server, files):
    low = noise(24, 16)
    pixels = ask(server, "sd-x4", "/upscale", image=base64_of(low), noise_level=30)
    x = torch.from_numpy(np.asarray(low).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    made = load(files["sd-x4"]).upscale(x, [5], 2, 30, [ConditioningInput("red apple", "blue")], 3.0)
    assert pixels.shape == (64, 96, 3)
    assert psnr(pixels, bytes_of(made[0])) > 40


def test_each_says_what_it_takes(server):
    listed = {model["name"]: model for model in server.client.get("/models").json()["models"]}
    assert listed["sd-x4"]["upscaling"] == {"scale": 4, "max_noise_level": 350}
    assert listed["sd2"]["defaults"]["width"] == 512  # as it predicts eps
    assert listed["sdxl"]["defaults"]["width"] == 1024

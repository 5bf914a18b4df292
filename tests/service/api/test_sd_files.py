"""Stable Diffusion's single files over HTTP."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.checkpoint import load
from models.conditioning.conditioner import ConditioningInput
from models.latent_diffusion import pixels_last, to_uint8
from tests.helpers.clients import image_of
from tests.helpers.images import base64_of, hole, noise, psnr
from tests.helpers.servers import Server

REQUEST = {"prompt": "red apple", "negative_prompt": "blue", "seed": 5, "steps": 2, "guidance_scale": 3.0}


def ask(families: Server, name: str, path: str = "/generate", **changes) -> np.ndarray:
    return image_of(families.client.post(path, json={"model": name} | REQUEST | changes))


def bytes_of(x: torch.Tensor) -> np.ndarray:
    return pixels_last(to_uint8(x))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@torch.inference_mode()
def test_a_prompt_gives_the_image_of_the_model_itself(families, sd_files, name):
    """SDXL is conditioned on the size; LDM_PREDICTION says what Stable Diffusion 2 predicts."""
    pixels = ask(families, name, width=64, height=128)
    model = load(sd_files[name], prediction="epsilon")
    x = model.sample([ConditioningInput("red apple", "blue")], [5], 2, 3.0, size=(64, 128))
    assert pixels.shape == (128, 64, 3)
    assert psnr(pixels, bytes_of(x[0])) > 40


def test_only_masked_pixels_are_repainted(families):
    size = (64, 64)
    images = {"image": base64_of(noise(*size)), "mask": base64_of(hole(size))}
    pixels, before, mask = ask(families, "sd1-inpainting", "/inpaint", **images), noise(*size), hole(size)
    kept = np.asarray(mask) == 0
    assert (pixels[kept] == np.asarray(before)[kept]).all()
    assert (pixels[~kept] != np.asarray(before)[~kept]).any()


@torch.inference_mode()
def test_upscaling_gives_the_image_of_the_model_itself(families, sd_files):
    low = noise(24, 16)
    pixels = ask(families, "sd-x4", "/upscale", image=base64_of(low), noise_level=30)
    x = torch.from_numpy(np.asarray(low).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    made = load(sd_files["sd-x4"]).upscale(x, [5], 2, 30, [ConditioningInput("red apple", "blue")], 3.0)
    assert pixels.shape == (64, 96, 3)
    assert psnr(pixels, bytes_of(made[0])) > 40


def test_each_model_is_listed_with_its_defaults(families):
    listed = {model["name"]: model for model in families.client.get("/models").json()["models"]}
    assert listed["sd-x4"]["upscaling"] == {"scale": 4, "max_noise_level": 350}
    assert listed["sd2"]["defaults"]["width"] == 512  # as it predicts eps
    assert listed["sdxl"]["defaults"]["width"] == 1024
    assert {listed[name]["limits"]["size_multiple"] for name in ("sd1", "sd2", "sdxl")} == {8}
    assert listed["sdxl-v"]["defaults"]["spacing"] == "trailing"


@pytest.mark.parametrize("name", ["sd1-no-vae", "sd1-averages"])
def test_a_separate_vae_and_unused_averages_change_nothing(families, name):
    assert (ask(families, name, width=64, height=64) == ask(families, "sd1", width=64, height=64)).all()


@torch.inference_mode()
def test_a_v_prediction_file_in_half_precision(families, downloaded_files):
    pixels = ask(families, "sdxl-v", width=64, height=64)
    x = load(downloaded_files["sdxl-v"]).sample(
        [ConditioningInput("red apple", "blue")], [5], 2, 3.0, size=(64, 64)
    )
    assert psnr(pixels, bytes_of(x[0])) > 40


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.inference_mode()
def test_sides_are_multiples_of_8(families, sd_files, name):
    pixels = ask(families, name, width=72, height=40)
    x = load(sd_files[name]).sample([ConditioningInput("red apple", "blue")], [5], 2, 3.0, size=(72, 40))
    assert pixels.shape == (40, 72, 3)
    assert psnr(pixels, bytes_of(x[0])) > 40

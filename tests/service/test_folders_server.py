"""SDXL, its inpainting and the 4x upscaler over HTTP, from folders: the pictures that `diffusers` makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from models.checkpoint import load
from tests.checkpoints import sd_folders
from tests.helpers.clients import error_of, image_of
from tests.helpers.images import base64_of, noise, psnr

SERVED = ("xl", "xl-inpainting", "x4-upscaler")
TOLD = {"prompt": "red apple on a blue background!", "guidance_scale": 4.0, "seed": 7, "steps": 3}


@pytest.fixture(scope="module")
def pipelines():
    return {name: sd_folders.pipeline(name) for name in SERVED}


@pytest.fixture(scope="module")
def written(pipelines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / name)
    return {name: folder / name for name in SERVED}


@pytest.fixture(scope="module")
def server(start_server, written):
    with start_server(*written.values()) as server:
        yield server


@torch.inference_mode()
def theirs(pipeline, **options):
    """The picture that a pipeline makes from the noise of seed 7, (H, W, 3) from 0 to 255."""
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    told = {"prompt": TOLD["prompt"], "guidance_scale": 4.0, "num_inference_steps": 3, "latents": start}
    return pipeline(**(told | options), output_type="np").images[0] * 255


@pytest.mark.parametrize("unwanted", [None, "blue pear"])
def test_generate(server, pipelines, unwanted):
    body = {"model": "xl"} | TOLD | ({"negative_prompt": unwanted} if unwanted else {})
    pixels = image_of(server.client.post("/generate", json=body))
    assert pixels.std() > 10
    assert psnr(pixels, theirs(pipelines["xl"], negative_prompt=unwanted)) > 45


def test_generate_at_another_size_is_told_so(server, pipelines):
    pixels = image_of(server.client.post("/generate", json={"model": "xl", "width": 96} | TOLD))
    start = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(7))
    assert psnr(pixels, theirs(pipelines["xl"], latents=start, width=96, height=64)) > 45


def test_inpaint(server, pipelines, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    shown, mask = noise(64, 64), np.zeros((64, 64), np.uint8)
    mask[8:40, 16:56] = 255
    body = {
        "model": "xl-inpainting",
        "image": base64_of(shown),
        "mask": base64_of(Image.fromarray(mask)),
    } | TOLD
    pixels = image_of(server.client.post("/inpaint", json=body))
    x = torch.from_numpy(np.asarray(shown).copy()).movedim(-1, 0)[None] / 255
    hole = torch.from_numpy(mask)[None, None] / 255
    expected = theirs(pipelines["xl-inpainting"], image=x, mask_image=hole, strength=1.0)
    assert (pixels[mask == 0] == np.asarray(shown)[mask == 0]).all()
    assert psnr(pixels[mask > 0], expected[mask > 0]) > 45


def test_upscale(server, pipelines):
    low, generator = noise(8, 8), torch.Generator().manual_seed(7)
    torch.randn(
        4, 8, 8, generator=generator
    )  # what ours starts from is drawn before what lies on the picture
    body = {"model": "x4-upscaler", "image": base64_of(low), "noise_level": 350} | TOLD
    pixels = image_of(server.client.post("/upscale", json=body))
    x = torch.from_numpy(np.asarray(low).copy()).movedim(-1, 0)[None] / 255
    expected = theirs(pipelines["x4-upscaler"], image=x, noise_level=350, generator=generator)
    assert pixels.shape == (32, 32, 3)
    assert psnr(pixels, expected) > 45


@torch.inference_mode()
def test_upscale_in_tiles_with_words_and_guidance(server, written):
    low = noise(24, 16)  # tiles of 8x8
    body = {"model": "x4-upscaler", "image": base64_of(low)} | TOLD
    pixels = image_of(server.client.post("/upscale", json=body))
    x = torch.from_numpy(np.asarray(low).copy()).movedim(-1, 0)[None].float() / 127.5 - 1
    made = load(written["x4-upscaler"]).upscale(x, [7], 3, 20, [TOLD["prompt"]], 4.0)
    assert pixels.shape == (64, 96, 3)
    expected = ((made[0].clamp(-1, 1) + 1) * 127.5).movedim(0, -1).numpy()
    alone = slice(0, 24)  # of the first tile; where tiles fade into each other the service has bytes
    assert psnr(pixels[alone, alone], expected[alone, alone]) > 45
    assert psnr(pixels, expected) > 25
    silent = image_of(server.client.post("/upscale", json=body | {"prompt": ""}))
    assert psnr(pixels, silent) < 40  # the words make a difference


def test_noise_of_more_than_350_is_refused(server):
    body = {"model": "x4-upscaler", "image": base64_of(noise(8, 8)), "noise_level": 351}
    assert error_of(server.client.post("/upscale", json=body), 422)["param"] == "noise_level"


def test_what_is_served_is_listed(server):
    listed = {model["name"]: model for model in server.client.get("/models").json()["models"]}
    assert listed["xl"]["tasks"] == ["text-to-image", "image-to-image", "inpainting"]
    assert listed["xl-inpainting"]["inpainting"] == "mask channels"
    assert listed["x4-upscaler"]["upscaling"] == {"scale": 4, "max_noise_level": 350}
    assert listed["x4-upscaler"]["defaults"]["noise_level"] == 20

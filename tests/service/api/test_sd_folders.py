"""SDXL, its inpainting and the 4x upscaler over HTTP, from folders: the images that `diffusers` makes."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from models.checkpoint import load
from tests.helpers.clients import error_of, image_of
from tests.helpers.images import base64_of, noise, psnr

REQUEST = {"prompt": "red apple on a blue background!", "guidance_scale": 4.0, "seed": 7, "steps": 3}


@torch.inference_mode()
def theirs(pipeline, **options):
    """The image that a pipeline makes from the noise of seed 7, (H, W, 3) from 0 to 255."""
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    given = {"prompt": REQUEST["prompt"], "guidance_scale": 4.0, "num_inference_steps": 3, "latents": start}
    return pipeline(**(given | options), output_type="np").images[0] * 255


@pytest.mark.parametrize("unwanted", [None, "blue pear"])
def test_generate(families, sd_pipelines, unwanted):
    body = {"model": "xl"} | REQUEST | ({"negative_prompt": unwanted} if unwanted else {})
    pixels = image_of(families.client.post("/generate", json=body))
    assert pixels.std() > 10
    assert psnr(pixels, theirs(sd_pipelines["xl"], negative_prompt=unwanted)) > 45


def test_zero_terminal_snr_with_trailing_spacing_and_rescaled_guidance(families, sd_pipelines):
    body = REQUEST | {"model": "xl-zero-snr", "guidance_rescale": 0.7}
    pixels = image_of(families.client.post("/generate", json=body))
    assert pixels.std() > 10
    assert psnr(pixels, theirs(sd_pipelines["xl-zero-snr"], guidance_rescale=0.7)) > 45
    plain = image_of(families.client.post("/generate", json=body | {"guidance_rescale": 0.0}))
    assert psnr(pixels, plain) < 40
    listed = {model["name"]: model for model in families.client.get("/models").json()["models"]}
    assert listed["xl-zero-snr"]["defaults"]["spacing"] == "trailing"


def test_a_model_trained_on_noise_levels(families, sd_pipelines):
    body = {"model": "playground", "prompt": REQUEST["prompt"], "seed": 7, "steps": 3}
    pixels = image_of(families.client.post("/generate", json=body))
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    expected = theirs(sd_pipelines["playground"], latents=start, guidance_scale=3.0)
    assert pixels.std() > 10
    assert psnr(pixels, expected) > 45
    listed = {model["name"]: model for model in families.client.get("/models").json()["models"]}
    defaults = listed["playground"]["defaults"]
    assert (defaults["sampler"], defaults["spacing"], defaults["guidance_scale"]) == (
        "dpmpp_2m",
        "karras",
        3.0,
    )


def test_generate_at_another_size(families, sd_pipelines):
    pixels = image_of(families.client.post("/generate", json={"model": "xl", "width": 96} | REQUEST))
    start = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(7))
    assert psnr(pixels, theirs(sd_pipelines["xl"], latents=start, width=96, height=64)) > 45


def test_generate_at_sides_that_are_no_multiple_of_the_coarsest_cell(families, sd_pipelines):
    body = {"model": "xl", "width": 72, "height": 40} | REQUEST
    start = torch.randn(1, 4, 5, 9, generator=torch.Generator().manual_seed(7))
    expected = theirs(sd_pipelines["xl"], latents=start, width=72, height=40)
    assert psnr(image_of(families.client.post("/generate", json=body)), expected) > 40


@torch.inference_mode()
@pytest.mark.parametrize("switch_at", [0.3, 0.8])
def test_the_refiner_makes_the_last_steps(families, sd_pipelines, switch_at):
    texts = {"negative_prompt": "blue pear", "num_inference_steps": 10}
    body = {"model": "xl", "refiner": {"model": "xl-refiner", "switch_at": switch_at}} | REQUEST
    body |= {"steps": 10, "negative_prompt": "blue pear"}
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    base, refiner = sd_pipelines["xl"], sd_pipelines["xl-refiner"]
    given = {"prompt": REQUEST["prompt"], "guidance_scale": 4.0} | texts
    z = base(**given, latents=start, denoising_end=switch_at, output_type="latent").images
    expected = refiner(**given, image=z, denoising_start=switch_at, output_type="np").images[0] * 255
    pixels = image_of(families.client.post("/generate", json=body))
    plain = image_of(families.client.post("/generate", json=body | {"refiner": None}))
    assert psnr(pixels, expected) > max(40, psnr(pixels, plain) + 3)


@pytest.mark.parametrize(
    ("refiner", "param"),
    [
        ({"model": "xl"}, "refiner.model"),
        ({"model": "sd1"}, "refiner.model"),
        ({"model": "xl-inpainting"}, "refiner.model"),
        ({"model": "none"}, "refiner.model"),
        ({"model": "xl-refiner", "switch_at": 0.99}, "refiner.switch_at"),
        ({"model": "xl-refiner", "switch_at": 1.0}, "refiner.switch_at"),
    ],
)
def test_a_refiner_that_does_not_fit_is_refused(families, refiner, param):
    answer = families.client.post("/generate", json={"model": "xl", "refiner": refiner} | REQUEST)
    assert error_of(answer, 422)["param"] == param


def test_a1111s_refiner_is_the_native_one(families):
    body = {"prompt": "red apple", "steps": 5, "cfg_scale": 4, "seed": 7, "sampler_name": "DDIM"}
    body |= {"refiner_checkpoint": "xl-refiner.safetensors [0123456789]", "refiner_switch_at": 0.6}
    body["override_settings"] = {"sd_model_checkpoint": "xl"}
    answer = families.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert "Refiner: xl-refiner, Refiner switch at: 0.6" in json.loads(answer.json()["info"])["infotexts"][0]
    native = {"model": "xl", "refiner": {"model": "xl-refiner", "switch_at": 0.6}, "prompt_weights": True}
    native |= REQUEST | {"prompt": "red apple", "steps": 5, "long_prompts": "chunk"}
    made = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))
    assert (np.asarray(made) == image_of(families.client.post("/generate", json=native))).all()
    refused = families.client.post("/sdapi/v1/txt2img", json=body | {"refiner_switch_at": 0})
    assert error_of(refused, 422)["param"] == "refiner_switch_at"


def test_inpaint(families, sd_pipelines, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    shown, mask = noise(64, 64), np.zeros((64, 64), np.uint8)
    mask[8:40, 16:56] = 255
    body = {
        "model": "xl-inpainting",
        "image": base64_of(shown),
        "mask": base64_of(Image.fromarray(mask)),
    } | REQUEST
    pixels = image_of(families.client.post("/inpaint", json=body))
    x = torch.from_numpy(np.asarray(shown).copy()).movedim(-1, 0)[None] / 255
    hole = torch.from_numpy(mask)[None, None] / 255
    expected = theirs(sd_pipelines["xl-inpainting"], image=x, mask_image=hole, strength=1.0)
    assert (pixels[mask == 0] == np.asarray(shown)[mask == 0]).all()
    assert psnr(pixels[mask > 0], expected[mask > 0]) > 45


def test_refine_an_image(families, sd_pipelines, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    shown = noise(64, 64)
    body = {"model": "xl-refiner", "init_image": base64_of(shown), "strength": 0.7, "negative_prompt": "blue"}
    pixels = image_of(families.client.post("/generate", json=REQUEST | body))
    x = torch.from_numpy(np.asarray(shown).copy()).movedim(-1, 0)[None] / 255
    with torch.inference_mode():
        expected = sd_pipelines["xl-refiner"](
            REQUEST["prompt"], negative_prompt="blue", image=x, strength=0.7, num_inference_steps=3,
            guidance_scale=4.0, generator=torch.Generator().manual_seed(7), output_type="np",
        ).images[0] * 255  # fmt: skip
    assert pixels.std() > 10
    assert psnr(pixels, expected) > 45
    error = error_of(families.client.post("/generate", json=REQUEST | {"model": "xl-refiner"}), 422)
    assert error["param"] == "model"


@torch.inference_mode()
def edited(pipeline, shown, **options):
    """The image of InstructPix2Pix's pipeline, (H, W, 3) from 0 to 255."""
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    x = torch.from_numpy(np.asarray(shown).copy()).movedim(-1, 0)[None] / 255
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, "latents": start, "output_type": "np"}
    return pipeline(REQUEST["prompt"], image=x, **given | options).images[0] * 255


@pytest.mark.parametrize("scales", [(4.0, 1.5), (4.0, 4.0), (7.5, 2.5)])
def test_edit_an_image(families, sd_pipelines, scales):
    shown, (text, image) = noise(64, 64), scales
    body = {"model": "pix2pix", "init_image": base64_of(shown), "negative_prompt": "blue"}
    body |= {"guidance_scale": text} | ({} if image == 1.5 else {"image_guidance_scale": image})
    pixels = image_of(families.client.post("/generate", json=REQUEST | body))
    options = {"negative_prompt": "blue", "guidance_scale": text, "image_guidance_scale": image}
    assert pixels.std() > 10
    assert psnr(pixels, edited(sd_pipelines["pix2pix"], shown, **options)) > 45


def test_edits_by_a1111s_names(families, sd_pipelines):
    shown = noise(64, 64)
    body = {
        "init_images": [base64_of(shown)], "prompt": REQUEST["prompt"], "seed": 7, "steps": 3,
        "cfg_scale": 4.0, "image_cfg_scale": 2.5, "width": 64, "height": 64, "sampler_name": "DDIM",
        "denoising_strength": 1,
        "override_settings": {"sd_model_checkpoint": "pix2pix"},
    }  # fmt: skip
    answer = families.client.post("/sdapi/v1/img2img", json=body)
    assert answer.status_code == 200, answer.text
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))))
    expected = edited(sd_pipelines["pix2pix"], shown, image_guidance_scale=2.5)
    assert psnr(pixels, expected) > 45
    assert "Image CFG scale: 2.5" in answer.json()["info"]


def test_only_models_that_edit_take_an_image_guidance_scale(families):
    body = {"model": "xl", "init_image": base64_of(noise(64, 64)), "image_guidance_scale": 2.0}
    assert (
        error_of(families.client.post("/generate", json=REQUEST | body), 422)["param"]
        == "image_guidance_scale"
    )
    listed = {model["name"]: model for model in families.client.get("/models").json()["models"]}
    assert "image_guidance_scale" in listed["pix2pix"]["extras"]
    assert listed["pix2pix"]["tasks"] == ["image-to-image"]


def test_upscale(families, sd_pipelines):
    low, generator = noise(8, 8), torch.Generator().manual_seed(7)
    torch.randn(4, 8, 8, generator=generator)  # ours draws the start before the noise on the low image
    body = {"model": "x4-upscaler", "image": base64_of(low), "noise_level": 350} | REQUEST
    pixels = image_of(families.client.post("/upscale", json=body))
    x = torch.from_numpy(np.asarray(low).copy()).movedim(-1, 0)[None] / 255
    expected = theirs(sd_pipelines["x4-upscaler"], image=x, noise_level=350, generator=generator)
    assert pixels.shape == (32, 32, 3)
    assert psnr(pixels, expected) > 45


@torch.inference_mode()
def test_upscale_in_tiles_with_prompt_and_guidance(families, sd_folders):
    low = noise(24, 16)  # tiles of 8x8
    body = {"model": "x4-upscaler", "image": base64_of(low)} | REQUEST
    pixels = image_of(families.client.post("/upscale", json=body))
    x = torch.from_numpy(np.asarray(low).copy()).movedim(-1, 0)[None].float() / 127.5 - 1
    made = load(sd_folders["x4-upscaler"]).upscale(x, [7], 3, 20, [REQUEST["prompt"]], 4.0)
    assert pixels.shape == (64, 96, 3)
    expected = ((made[0].clamp(-1, 1) + 1) * 127.5).movedim(0, -1).numpy()
    alone = slice(0, 24)  # within the first tile; where tiles overlap, the service blends bytes
    assert psnr(pixels[alone, alone], expected[alone, alone]) > 45
    assert psnr(pixels, expected) > 25
    silent = image_of(families.client.post("/upscale", json=body | {"prompt": ""}))
    assert psnr(pixels, silent) < 40  # the prompt makes a difference


def test_noise_of_more_than_350_is_refused(families):
    body = {"model": "x4-upscaler", "image": base64_of(noise(8, 8)), "noise_level": 351}
    assert error_of(families.client.post("/upscale", json=body), 422)["param"] == "noise_level"


def test_each_model_is_listed_with_its_tasks(families):
    listed = {model["name"]: model for model in families.client.get("/models").json()["models"]}
    assert listed["xl"]["tasks"] == ["text-to-image", "image-to-image", "inpainting"]
    assert listed["xl-inpainting"]["inpainting"] == "mask channels"
    assert listed["x4-upscaler"]["upscaling"] == {"scale": 4, "max_noise_level": 350}
    assert listed["x4-upscaler"]["defaults"]["noise_level"] == 20

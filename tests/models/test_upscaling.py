"""Upscalers: the saved folder against `diffusers`, tiles, and residual latents."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from PIL import Image
from torch.nn.functional import interpolate

from models.checkpoint import CheckpointError, load, save
from models.enlargement import back_project, follow_low_resolution, resample
from models.latent_diffusion import LatentDiffusion
from models.spec import ModelSpec, UpscalingSpec
from tests.checkpoints.tiny import random_model, upscaler_spec
from tests.helpers.numbers import LIMIT, relative_error


@pytest.fixture(scope="module")
def upscaler() -> LatentDiffusion:
    return random_model(upscaler_spec())


@pytest.fixture(scope="module")
def folder(upscaler, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "upscaler"
    save(upscaler, path, torch.float32)
    return path


def replace_spec(model: LatentDiffusion, upscaling: UpscalingSpec) -> LatentDiffusion:
    spec = replace(model.spec, upscaling=upscaling)
    return LatentDiffusion(spec, model.unet, model.autoencoder, model.conditioner)


def test_a_saved_upscaler_loads_with_the_same_spec(upscaler, folder):
    assert load(folder).spec == upscaler.spec
    assert ModelSpec.from_dict(upscaler.spec.to_dict()) == upscaler.spec


@torch.inference_mode()
def test_the_networks_match_diffusers(folder):
    ours = load(folder)
    unet, vae = UNet2DModel.from_pretrained(folder / "unet"), AutoencoderKL.from_pretrained(folder / "vqvae")
    x, t, levels = torch.randn(3, 7, 8, 8), torch.tensor([1, 500, 999]), torch.tensor([0, 4, 9])
    assert (
        relative_error(ours.unet(x, t, noise_level=levels), unet(x, t, class_labels=levels).sample) <= LIMIT
    )
    z, images = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 32, 32)
    assert relative_error(ours.autoencoder.decode(z), vae.decode(z).sample) <= LIMIT
    assert relative_error(ours.autoencoder.encode(images), vae.encode(images).latent_dist.mode()) <= LIMIT


@torch.inference_mode()
def test_a_whole_run_matches_diffusers(upscaler, folder):
    """From the same noise, with the same noise on the low-resolution image."""
    low, steps = torch.rand(1, 3, 16, 16) * 2 - 1, 4
    x, concat = upscaler.start_upscaling(low[0], seed=3, noise_level=5)
    unet, vae = UNet2DModel.from_pretrained(folder / "unet"), AutoencoderKL.from_pretrained(folder / "vqvae")
    grain = (concat - low[0] * (1 - 0.0001) ** 0.5).std()
    assert 0.03 < grain < 0.08  # sqrt(1 - alpha_bar[5]) of betas from 0.0001
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    z = x[None]
    for t in scheduler.timesteps:
        v = unet(torch.cat([z, concat[None]], dim=1), t, class_labels=torch.tensor([5])).sample
        z = scheduler.step(v, t, z).prev_sample
    expected = vae.decode(z / vae.config.scaling_factor).sample
    assert relative_error(upscaler.upscale(low, [3], steps, noise_level=5), expected) <= 1e-4


@torch.inference_mode()
def test_tiles_share_one_field_of_noise(upscaler):
    """Where no other tile overlaps, a tile is what it would be alone with its part of the noise."""
    low = torch.rand(1, 3, 16, 28) * 2 - 1
    whole = upscaler.upscale(low, [7], steps=2, noise_level=0)
    noise, concat = upscaler.start_upscaling(low[0], 7, 0)
    levels = upscaler.noise_levels([0])
    z = upscaler.denoise(
        noise[None, :, :, 12:],
        2,
        lambda x, t, _: upscaler.denoiser(x, t, concat_channels=concat[None, :, :, 12:], noise_level=levels),
    )
    assert torch.allclose(whole[..., 64:], upscaler.decode(z)[..., 16:], atol=1e-4)


@torch.inference_mode()
def test_a_residual_latent_is_added_to_that_of_the_resampled_image(tmp_path):
    plain = upscaler_spec()
    spec = replace(
        plain,
        unet=replace(plain.unet, in_channels=4 + 3 + 4),
        upscaling=replace(plain.upscaling, residual=True),
    )
    model = random_model(spec)
    save(model, tmp_path / "residual", torch.float32)
    assert load(tmp_path / "residual").spec == spec
    low = torch.rand(1, 3, 16, 16) * 2 - 1
    noised = model.start_upscaling(low[0], 0, 0)[1]
    concat = model.tile_concat_channels(noised)
    base = model.encode(resample(noised[None], 4))
    assert torch.equal(concat, torch.cat([noised, base[0]]))
    assert torch.equal(model.add_residual_base(torch.zeros_like(base), concat[None]), base)
    assert model.upscale(low, [0], 2).shape == (1, 3, 64, 64)
    assert relative_error(resample(low, 4), interpolate(low, scale_factor=4, mode="bicubic")) < 0.05


def test_back_projection_brings_the_shrunk_image_nearer_to_the_small_one():
    """Shrunk by Pillow, which resamples bicubically with antialiasing."""

    def shrunk(x):
        channels = (Image.fromarray(channel.numpy(), "F").resize((12, 8), Image.BICUBIC) for channel in x[0])
        return np.stack([np.asarray(channel) for channel in channels])

    low = torch.rand(1, 3, 8, 12) - 0.5
    x = resample(low, 4) + 0.1 * torch.randn(1, 3, 32, 48) + 0.2
    corrected = back_project(x, low)
    before, after = (np.abs(shrunk(each) - low[0].numpy()).mean() for each in (x, corrected))
    assert before > 0.15
    assert after < 0.3 * before
    same = torch.full((1, 3, 32, 48), 0.25)
    assert torch.allclose(back_project(same, torch.full((1, 3, 8, 12), 0.25)), same, atol=1e-6)


def test_smooth_areas_are_resampled_bicubically_and_edges_are_left():
    """Bicubic resampling as Pillow does it; the left half is a gradient, the right half has edges."""
    low = torch.zeros(1, 3, 8, 16)
    low[..., :8] = torch.linspace(-0.2, 0.2, 8)
    low[..., 8:] = torch.tensor([[0.9, -0.9], [-0.9, 0.9]]).repeat(4, 4)
    pillow = [Image.fromarray(c.numpy(), "F").resize((64, 32), Image.BICUBIC) for c in low[0]]
    bicubic = torch.from_numpy(np.stack([np.asarray(each) for each in pillow]))
    x = bicubic[None] + 0.05 * torch.randn(1, 3, 32, 64)
    corrected = follow_low_resolution(x, low)
    assert (corrected - bicubic)[..., 8:20].abs().mean() < 0.001
    assert torch.allclose(corrected[..., 44:], back_project(x, low)[..., 44:], atol=1e-3)


@torch.inference_mode()
def test_back_projection_is_saved_and_applies_at_noise_level_0_only(upscaler, tmp_path):
    upscaling = replace(upscaler.spec.upscaling, back_projection=True)
    save(replace_spec(upscaler, upscaling), tmp_path / "corrected", torch.float32)
    corrected = load(tmp_path / "corrected")
    assert corrected.spec.upscaling == upscaling
    low = torch.rand(1, 3, 16, 28) - 0.5
    assert torch.equal(corrected.upscale(low, [3], 2, noise_level=5), upscaler.upscale(low, [3], 2, 5))
    shrunk = [
        interpolate(model.upscale(low, [3], 2), (16, 28), mode="bicubic", antialias=True)
        for model in (upscaler, corrected)
    ]
    assert relative_error(shrunk[1], low) < 0.3 * relative_error(shrunk[0], low)


@torch.inference_mode()
def test_the_image_and_the_noise_level_change_the_result(upscaler):
    low = torch.rand(2, 3, 8, 8) * 2 - 1
    first, other = upscaler.upscale(low, [1, 1], 2), upscaler.upscale(low[:1], [1], 2, noise_level=9)
    assert relative_error(first[0], first[1]) > 0.01
    assert relative_error(first[0], other[0]) > 0.01


def test_noise_levels_that_do_not_fit_the_table_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index | {"max_noise_level": 20}))
    with pytest.raises(CheckpointError, match="noise levels"):
        load(tmp_path / "other")

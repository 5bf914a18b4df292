"""Training of the upscaler: its autoencoder on sharp crops, then its UNet on residual latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.dtypes import mixed_precision
from models.enlargement import resample
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet, timestep_embedding
from models.sampling.schedule import Schedule
from models.spec import AutoencoderSpec, ScheduleSpec, UNetSpec, UpscalingSpec
from models.training import first_stage
from models.training.crops import degrade, draw_crop
from models.training.diffusion import v_error
from models.training.first_stage import to_x
from models.training.scenes import Atlas
from models.training.trainer import Budget, Trainer

CHUNK = 64  # crops encoded at once
PART = 64  # side in pixels of the random parts of crops that the autoencoder trains on
VARIANTS = 3  # degraded copies of each sharp image
NOISELESS_SHARE = 0.6  # of degraded copies in a batch: noise level 0


def draw_crops(count: int, seed: int) -> Tensor:
    """Draws sharp images, uint8 (N, 128, 128, 3)."""
    atlas, rng = Atlas(), np.random.default_rng(seed)
    drawn = (draw_crop(atlas, rng) for _ in tqdm(range(count), desc="crops"))
    return torch.from_numpy(np.stack(list(drawn)))


def parts(crops: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of random parts of crops, x (size, 3, 64, 64) in [-1, 1]."""
    rng, positions = np.random.default_rng(seed), crops.shape[1] - PART + 1
    while True:
        index = rng.integers(len(crops), size=size).tolist()
        corners = rng.integers(0, positions, (size, 2)).tolist()
        chosen = zip(index, corners, strict=True)
        yield to_x(torch.stack([crops[i, y : y + PART, x : x + PART] for i, (y, x) in chosen]))


def train_first_stage(
    spec: AutoencoderSpec, crops: Tensor, budget: Budget, state: Path, device: torch.device
) -> None:
    """Trains the autoencoder on parts of crops; resumes from `state`."""
    autoencoder = Autoencoder(spec)
    trainer = Trainer(autoencoder, budget, state, device)
    stream = parts(crops, budget.batch, trainer.progress.updates)
    trainer.run(stream, lambda x: first_stage.loss(autoencoder, x.to(device)), "first stage")


class Batch(NamedTuple):
    """The data of one update."""

    z: Tensor  # (B, C, h, w), scaled residual: latent of the sharp image minus that of the resampled one
    concat_channels: Tensor  # (B, 3 + C, h, w): noised low-resolution image, its resampled latent
    level: Tensor  # (B,), noise level of the low-resolution image


@torch.no_grad()
def encode_crops(
    autoencoder: Autoencoder, crops: Tensor, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Encodes and degrades N crops: {"latents": (N, C, h, w), "low": (N, VARIANTS, 3, h, w)}.

    latents: of the sharp images, unscaled bfloat16; low: degraded copies, uint8.
    """
    rng, latents, low = np.random.default_rng(seed), [], []
    for chunk in tqdm(crops.split(CHUNK), desc="latents", unit_scale=CHUNK, unit="crop"):
        with mixed_precision(device):
            latents.append(autoencoder.encode(to_x(chunk).to(device)).bfloat16())
        small = [[degrade(crop, rng) for _ in range(VARIANTS)] for crop in chunk.numpy()]
        low.append(torch.from_numpy(np.array(small)).movedim(-1, 2))
    return {"latents": torch.cat(latents), "low": torch.cat(low).to(device)}


@torch.no_grad()
def encode_resampled(autoencoder: Autoencoder, low: Tensor) -> Tensor:
    """Unscaled latent of images resampled to the full size: (B, 3, h, w) -> (B, C, h, w), float32."""
    with mixed_precision(low.device):
        return autoencoder.encode(resample(low, autoencoder.spec.factor)).float()


def residuals(autoencoder: Autoencoder, data: dict[str, Tensor], count: int = 512) -> Tensor:
    """Residual latents of the first `count` crops, unscaled (N, C, h, w), float32."""
    low = data["low"][:count, 0].float() / 127.5 - 1
    base = torch.cat([encode_resampled(autoencoder, part) for part in low.split(CHUNK)])
    return data["latents"][:count].float() - base


def batches(
    data: dict[str, Tensor], autoencoder: Autoencoder, scale: float, spec: UpscalingSpec, size: int, seed: int
) -> Iterator[Batch]:
    """Endless random batches: of each crop one degraded copy, with noise of a random level.

    scale: the autoencoder's scale_factor. Raises ValueError if the spec has no noise schedule.
    """
    if spec.noise is None:
        raise ValueError("training an upscaler requires a noise schedule")
    generator, count, device = torch.Generator().manual_seed(seed), len(data["latents"]), data["low"].device
    alpha_bar = torch.from_numpy(Schedule(spec.noise).alpha_bar).to(device, torch.float32)

    def integers(limit: int, size: int) -> Tensor:
        return torch.randint(limit, (size,), generator=generator).to(device)

    while True:
        index, variant = integers(count, size), integers(VARIANTS, size)
        low = data["low"][index, variant].float() / 127.5 - 1
        noiseless = torch.rand(size, generator=generator).to(device) < NOISELESS_SHARE
        level = torch.where(noiseless, 0, integers(spec.max_noise_level + 1, size))
        signal = alpha_bar[level][:, None, None, None]
        low = signal.sqrt() * low + (1 - signal).sqrt() * torch.randn_like(low)
        base = encode_resampled(autoencoder, low)
        z = data["latents"][index].float() - base
        yield Batch(scale * z, torch.cat([low, scale * base], dim=1), level)


def make_network(spec: UNetSpec) -> UNet:
    """A UNet whose noise level embeddings start as sinusoids, so that neighbouring levels are similar."""
    network = UNet(spec)
    assert isinstance(network.label_emb, nn.Embedding)
    levels = network.label_emb.weight
    with torch.no_grad():
        levels.copy_(timestep_embedding(torch.arange(len(levels)), levels.shape[1]))
    return network


def train(
    spec: UNetSpec,
    upscaling: UpscalingSpec,
    schedule: ScheduleSpec,
    data: dict[str, Tensor],
    autoencoder: Autoencoder,
    scale: float,
    budget: Budget,
    state: Path,
    device: torch.device,
) -> None:
    """Trains the UNet to predict v of residual latents; resumes from `state`."""
    network, table = make_network(spec), Schedule(schedule).alpha_bar
    trainer = Trainer(network, budget, state, device)
    # Uniform in the angle between signal and noise: all of an upscaler's few steps matter equally.
    density = torch.from_numpy(np.gradient(np.arccos(np.sqrt(table)))).to(device, torch.float32)
    alpha_bar = torch.from_numpy(table).to(device, torch.float32)

    def loss(batch: Batch) -> Tensor:
        def predict(z_t: Tensor, t: Tensor) -> Tensor:
            v: Tensor = network(torch.cat([z_t, batch.concat_channels], dim=1), t, noise_level=batch.level)
            return v

        return v_error(predict, batch.z, alpha_bar, density)

    stream = batches(data, autoencoder, scale, upscaling, budget.batch, seed=trainer.progress.updates)
    trainer.run(stream, loss, "upscaler")

"""Second stage of an upscaler's training: its UNet and decoder together, on the enlarged image itself.

The first stage trains the UNet on latents, in which an error that is small on average may be large in a flat
image. Here one sampling step from noise is decoded, corrected as while serving, and compared with the sharp
image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.enlargement import follow_low_resolution
from models.latent_diffusion import LatentDiffusion
from models.sampling.schedule import Schedule
from models.training.crops import degrade
from models.training.diffusion import v_error
from models.training.first_stage import to_x
from models.training.trainer import Budget, Trainer
from models.training.upscaler import NOISELESS_SHARE, encode_resampled

VARIANTS = 2  # degraded copies of each sharp image
LATENT_WEIGHT = 0.3  # of the error of v, which keeps several steps working
ROUNDING_ERROR = (1 / 255) ** 2  # squared errors below this one hardly count


class Network(nn.Module):
    """What is trained: the UNet and the decoder. The encoder is frozen."""

    def __init__(self, model: LatentDiffusion) -> None:
        """Raises ValueError if the model is not an upscaler of residual latents."""
        super().__init__()
        if model.unet is None or not model.upscaling.residual or model.upscaling.noise is None:
            raise ValueError(f"{model.spec.name} is not an upscaler of residual latents with noise levels")
        self.unet, self.autoencoder = model.unet.requires_grad_(True), model.autoencoder.requires_grad_(True)
        self.autoencoder.encoder.requires_grad_(False)
        self.autoencoder.quant_conv.requires_grad_(False)


class Batch(NamedTuple):
    """The data of one update."""

    sharp: Tensor  # (B, 3, H, W) in [-1, 1]
    low: Tensor  # (B, 3, h, w), with noise of its level
    level: Tensor  # (B,), noise level


def degrade_crops(crops: Tensor, seed: int) -> Tensor:
    """Degraded copies of sharp images: (N, H, W, 3) -> (N, VARIANTS, 3, H/4, W/4), uint8."""
    rng = np.random.default_rng(seed)
    low = [[degrade(crop, rng) for _ in range(VARIANTS)] for crop in tqdm(crops.numpy(), desc="low")]
    return torch.from_numpy(np.array(low)).movedim(-1, 2)


def batches(
    crops: Tensor, low: Tensor, alpha_bar: Tensor, levels: int, size: int, seed: int
) -> Iterator[Batch]:
    """Endless random batches: of each crop one degraded copy, with noise of a level below `levels`.

    alpha_bar: of the schedule of this noise; most copies have level 0.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(len(crops), (size,), generator=generator)
        variant = torch.randint(VARIANTS, (size,), generator=generator)
        small = low[index, variant].float() / 127.5 - 1
        noiseless = torch.rand(size, generator=generator) < NOISELESS_SHARE
        level = torch.where(noiseless, 0, torch.randint(levels, (size,), generator=generator))
        signal = alpha_bar[level][:, None, None, None]
        noised = signal.sqrt() * small + (1 - signal).sqrt() * torch.randn_like(small)
        yield Batch(to_x(crops[index]), torch.where(level[:, None, None, None] > 0, noised, small), level)


def image_error(made: Tensor, sharp: Tensor) -> Tensor:
    """Mean over images of the logarithm of their mean squared error, a scalar.

    Its gradient is that of the mean PSNR: an image that is easy to enlarge counts as much as a hard one.
    """
    return ((made - sharp).square().mean((1, 2, 3)) + ROUNDING_ERROR).log().mean()


def train(
    model: LatentDiffusion, crops: Tensor, low: Tensor, budget: Budget, state: Path, device: torch.device
) -> bool:
    """Trains the model's UNet and decoder in place; resumes from `state`.

    crops: (N, H, W, 3) uint8, sharp; low: from degrade_crops(). Returns True once the budget is spent.
    """
    network, spec, scale = Network(model), model.spec, model.spec.autoencoder.scale_factor
    trainer = Trainer(network, budget, state, device)
    noise = model.upscaling.noise
    assert noise is not None
    table = Schedule(spec.schedule).alpha_bar
    alpha_bar = torch.from_numpy(table).to(device, torch.float32)
    density = torch.from_numpy(np.gradient(np.arccos(np.sqrt(table)))).to(device, torch.float32)
    last = len(alpha_bar) - 1

    def loss(batch: Batch) -> Tensor:
        sharp, small, level = (part.to(device) for part in batch)
        with torch.no_grad():
            base = encode_resampled(network.autoencoder, small)
            z = scale * (network.autoencoder.encode(sharp).float() - base)
        concat = torch.cat([small, scale * base], dim=1)

        def predict(z_t: Tensor, t: Tensor) -> Tensor:
            v: Tensor = network.unet(torch.cat([z_t, concat], dim=1), t, noise_level=level)
            return v.float()

        start, ab = torch.randn_like(z), alpha_bar[last]
        v = predict(start, torch.full_like(level, last))
        made = network.autoencoder.decode(base + (ab.sqrt() * start - (1 - ab).sqrt() * v) / scale).float()
        corrected = torch.where(level[:, None, None, None] > 0, made, follow_low_resolution(made, small))
        return image_error(corrected, sharp) + LATENT_WEIGHT * v_error(predict, z, alpha_bar, density)

    levels = model.upscaling.max_noise_level + 1
    noise_table = torch.from_numpy(Schedule(noise).alpha_bar).float()
    stream = batches(crops, low, noise_table, levels, budget.batch, trainer.progress.updates)
    return trainer.run(stream, loss, "refinement")

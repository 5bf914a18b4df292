"""Training of the autoencoder: reconstruction error and a small KL penalty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from models.networks.autoencoder import Autoencoder
from models.training.scenes import Atlas, Pixels, draw_scene
from models.training.trainer import Budget, Trainer

KL_WEIGHT = 1e-4  # weight of the KL divergence, as a mean over the latent's elements


class Scenes(IterableDataset[Pixels]):
    """An endless stream of drawn images (128, 128, 3), over every glyph of the font."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[Pixels]:
        worker = get_worker_info()
        rng, atlas = np.random.default_rng([self.seed, worker.id if worker else 0]), Atlas()
        while True:
            yield draw_scene(atlas, rng, sizes=(56, 121)).image.copy()


def to_x(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def loss(autoencoder: Autoencoder, x: Tensor, only_decoder: bool = False) -> Tensor:
    """Reconstruction error plus KL divergence of q(z | x) from a unit Gaussian, a scalar.

    Rombach et al. 2021, section 3.1. x (B, 3, H, W) in [-1, 1]. only_decoder: the encoder is frozen, and the
    divergence is left out.
    """
    with torch.set_grad_enabled(not only_decoder):
        mean, logvar = (m.float() for m in autoencoder.moments(x))
    z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    out = autoencoder.decode(z).float()
    error = mse_loss(out, x) + 0.25 * l1_loss(out, x)
    if only_decoder:
        return error
    return error + KL_WEIGHT * 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def train(
    autoencoder: Autoencoder,
    budget: Budget,
    state: Path,
    device: torch.device,
    only_decoder: bool = False,
    workers: int = 1,
) -> bool:
    """Trains the autoencoder, or its decoder alone, on drawn scenes; resumes from `state`.

    Returns True once the budget is spent.
    """
    if only_decoder:
        for part in (autoencoder.encoder, autoencoder.quant_conv):
            part.requires_grad_(False)
    trainer = Trainer(autoencoder, budget, state, device)
    data = DataLoader(Scenes(trainer.progress.updates), batch_size=budget.batch, num_workers=workers)
    batches = (to_x(batch.to(device)) for batch in data)
    return trainer.run(batches, lambda x: loss(autoencoder, x, only_decoder), "autoencoder")

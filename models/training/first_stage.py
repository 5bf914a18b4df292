"""Training of the autoencoder: reconstruction error and a small KL penalty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from models.networks.autoencoder import Autoencoder
from models.training.scenes import Atlas, Pixels, draw_scene
from models.training.trainer import Budget, Trainer

KL_WEIGHT = 1e-4  # weight of the KL divergence, as a mean over the latent's elements
WIDE_LOG_VARIANCE = -7.0  # of new latent channels at first
L1_WEIGHT = 0.1  # weight of the absolute error, which keeps edges sharp, besides the squared error
KEPT_WEIGHT = 0.005  # weight of the change of the latent channels of the model that training started from
KEPT_IMAGES = 2  # of each update, on which that change is measured


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


@torch.no_grad()
def widen(autoencoder: Autoencoder, start: Autoencoder) -> None:
    """Copies the weights of a trained autoencoder into one that may have more latent channels.

    The first channels are those of `start`; the decoder ignores the others at first. Raises RuntimeError if
    the two differ in more than that.
    """
    narrow, wide = start.spec.latent_channels, autoencoder.spec.latent_channels
    first = torch.arange(narrow)
    moments = torch.cat([first, wide + first])  # means, then log-variances
    resized = ("encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in")
    kept = {key: value for key, value in start.state_dict().items() if not key.startswith(resized)}
    autoencoder.load_state_dict(kept, strict=False)
    for conv in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        nn.init.dirac_(conv.weight)
        bias_of(conv).zero_()
    autoencoder.quant_conv.weight[wide + narrow :] = 0.0
    bias_of(autoencoder.quant_conv)[wide + narrow :] = WIDE_LOG_VARIANCE
    nn.init.zeros_(autoencoder.decoder.conv_in.weight)
    place(start.encoder.conv_out, autoencoder.encoder.conv_out, rows=moments)
    place(start.quant_conv, autoencoder.quant_conv, rows=moments, columns=moments)
    place(start.post_quant_conv, autoencoder.post_quant_conv, rows=first, columns=first)
    place(start.decoder.conv_in, autoencoder.decoder.conv_in, columns=first)


def place(
    narrow: nn.Conv2d, wide: nn.Conv2d, rows: Tensor | None = None, columns: Tensor | None = None
) -> None:
    """Copies a convolution's weights into a wider one, whose outputs `rows` and inputs `columns` they become.

    None: all of them.
    """
    rows = torch.arange(wide.out_channels) if rows is None else rows
    columns = torch.arange(wide.in_channels) if columns is None else columns
    wide.weight[rows[:, None], columns] = narrow.weight
    bias_of(wide)[rows] = bias_of(narrow)


def bias_of(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def loss(autoencoder: Autoencoder, x: Tensor, only_decoder: bool = False) -> Tensor:
    """Reconstruction error plus KL divergence of q(z | x) from a unit Gaussian, a scalar.

    Rombach et al. 2021, section 3.1. x (B, 3, H, W) in [-1, 1]. only_decoder: the encoder is frozen, and the
    divergence is left out.
    """
    with torch.set_grad_enabled(not only_decoder):
        mean, logvar = (m.float() for m in autoencoder.moments(x))
    z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    out = autoencoder.decode(z).float()
    error = mse_loss(out, x) + L1_WEIGHT * l1_loss(out, x)
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
    kept: Autoencoder | None = None,
) -> bool:
    """Trains the autoencoder, or its decoder alone, on drawn scenes; resumes from `state`.

    kept: a trained autoencoder; the first latent channels stay close to its own, so that a UNet trained on
    them can be trained further. Returns True once the budget is spent.
    """
    if only_decoder:
        for part in (autoencoder.encoder, autoencoder.quant_conv):
            part.requires_grad_(False)
    trainer = Trainer(autoencoder, budget, state, device)
    data = DataLoader(Scenes(trainer.progress.updates), batch_size=budget.batch, num_workers=workers)
    batches = (to_x(batch.to(device)) for batch in data)

    def loss_of(x: Tensor) -> Tensor:
        error = loss(autoencoder, x, only_decoder)
        return error if kept is None or only_decoder else error + KEPT_WEIGHT * change(autoencoder, kept, x)

    return trainer.run(batches, loss_of, "autoencoder")


def change(autoencoder: Autoencoder, kept: Autoencoder, x: Tensor) -> Tensor:
    """Mean squared change of the latent channels of `kept`, on the first images of x; a scalar."""
    x = x[:KEPT_IMAGES]
    with torch.no_grad():
        before = kept.encode(x).float()
    return mse_loss(autoencoder.encode(x).float()[:, : before.shape[1]], before)

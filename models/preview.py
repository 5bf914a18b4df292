"""Previews of latents without the VAE decoder: a linear map from latents to colours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from models.latent_diffusion import LatentDiffusion, to_uint8

# The map is fitted to six images of 16x16 cells: 1536 cells, far more than it has coefficients.
FIT_CELLS = 16  # latent cells along a side of each image
COLOURS_PER_SIDE = (2, 4, 8, 2, 4, 8)  # random colours along a side of each image


class Projection:
    """A linear map from a latent cell to a colour, fitted by least squares to images of random colours."""

    def __init__(self, model: LatentDiffusion) -> None:
        """Fits the map with the model's own VAE encoder."""
        x = random_colours(FIT_CELLS * model.spec.autoencoder.factor)  # (B, 3, H, W)
        device = next(model.autoencoder.parameters()).device
        z = torch.cat([model.encode(image[None].to(device)).cpu() for image in x])  # (B, C, h, w)
        means = avg_pool2d(x, model.spec.autoencoder.factor)  # (B, 3, h, w)
        cells = append_one(z.movedim(1, -1).reshape(-1, z.shape[1]).double())  # (B*h*w, C + 1)
        colour = means.movedim(1, -1).reshape(-1, 3).double()
        # pinv() because lstsq() requires full rank.
        self.matrix = (torch.linalg.pinv(cells) @ colour).float()  # (C + 1, 3)

    def __call__(self, z: Tensor) -> Tensor:
        """Scaled z (C, h, w) -> (h, w, 3) uint8 on the CPU, one pixel per cell."""
        x = append_one(z.movedim(0, -1).float().cpu()) @ self.matrix
        return to_uint8(x.nan_to_num(0.0))


def append_one(cells: Tensor) -> Tensor:
    """Appends a 1 to each cell, for the map's offset: (..., C) -> (..., C + 1)."""
    return torch.cat([cells, torch.ones_like(cells[..., :1])], dim=-1)


def random_colours(side: int) -> Tensor:
    """Smooth images of random colours in [-1, 1]: (B, 3, side, side)."""
    generator = torch.Generator().manual_seed(0)
    coarse = [2 * torch.rand(1, 3, n, n, generator=generator) - 1 for n in COLOURS_PER_SIDE]
    return torch.cat([interpolate(x, (side, side), mode="bilinear") for x in coarse])

"""A latent as a small picture without D: one matrix, fitted to the model's own E."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from models.latent_diffusion import LatentDiffusion, to_uint8

PICTURES = 6  # 1536 cells for the few numbers of the matrix
CELLS = 16  # of a side of each
DETAILS = (2, 4, 8)  # colours along a side of the pictures it is fitted to


class Projection:
    """z -> colours: a linear map of each cell, by least squares over pictures of random colours."""

    def __init__(self, bundle: LatentDiffusion) -> None:
        x = colours(CELLS * bundle.spec.autoencoder.factor)  # (B, 3, H, W)
        device = next(bundle.autoencoder.parameters()).device
        z = torch.cat([bundle.encode(picture[None].to(device)).cpu() for picture in x])  # (B, C, h, w)
        means = avg_pool2d(x, bundle.spec.autoencoder.factor)  # (B, 3, h, w)
        cells = with_one(z.movedim(1, -1).reshape(-1, z.shape[1]).double())  # (B*h*w, C + 1)
        colour = means.movedim(1, -1).reshape(-1, 3).double()
        # Not lstsq(), whose solvers want a full rank.
        self.matrix = (torch.linalg.pinv(cells) @ colour).float()  # (C + 1, 3)

    def __call__(self, z: Tensor) -> Tensor:
        """Scaled z (C, h, w) -> (h, w, 3) uint8 on the CPU, one pixel a cell."""
        x = with_one(z.movedim(0, -1).float().cpu()) @ self.matrix
        return to_uint8(x.nan_to_num(0.0))


def with_one(cells: Tensor) -> Tensor:
    """(..., C) -> (..., C + 1), the last of which is 1."""
    return torch.cat([cells, torch.ones_like(cells[..., :1])], dim=-1)


def colours(side: int) -> Tensor:
    """Smooth pictures of random colours in [-1, 1]: (PICTURES, 3, side, side)."""
    generator = torch.Generator().manual_seed(0)
    coarse = [
        2 * torch.rand(1, 3, DETAILS[i % len(DETAILS)], DETAILS[i % len(DETAILS)], generator=generator) - 1
        for i in range(PICTURES)
    ]
    return torch.cat([interpolate(x, (side, side), mode="bilinear") for x in coarse])

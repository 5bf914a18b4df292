"""The tiny autoencoder's decoder (TAESD): from the UNet's latents to images, by a few convolutions.

Module names equal the keys of the published files `taesd_decoder` and `taesdxl_decoder` (Bohan 2023,
https://github.com/madebyollin/taesd). Latents are those that the UNet sees, not divided by a scale factor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FACTOR = 8  # pixels along one side of a latent cell
BLOCKS = (3, 3, 3, 1)  # at each size, from the latent's to the image's
WIDTH = 64


class Clamp(nn.Module):
    """Limits latents softly to -3 and 3."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


class Block(nn.Module):
    """Three convolutions with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w)."""
        out: Tensor = self.conv(x) + x
        return out.relu()


class TinyDecoder(nn.Sequential):
    """Scaled latent -> image."""

    def __init__(self, latent_channels: int, width: int = WIDTH) -> None:
        layers: list[nn.Module] = [Clamp(), nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU()]
        for index, blocks in enumerate(BLOCKS):
            if index:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
            layers += [Block(width) for _ in range(blocks)]
        super().__init__(*layers, nn.Conv2d(width, 3, 3, padding=1))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def forward(self, z: Tensor) -> Tensor:
        """z (B, C, h, w), as the UNet sees it -> x (B, 3, 8 h, 8 w), about in [-1, 1], float32."""
        x = z.to(self.dtype)
        for layer in self:
            x = layer(x)
        return 2 * x.float() - 1  # the layers' output is about in [0, 1]

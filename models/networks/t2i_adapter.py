"""T2I-Adapter (Mou et al. 2023, section 3.3): features of a control image at several sizes.

It reads neither the timestep nor the text, so it runs once for each image. Module names equal those of the
diffusers layout without its prefix `adapter`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, pixel_unshuffle, relu

from models.adapter_specs import T2IAdapterSpec
from models.networks.modules import module_list


class ResBlock(nn.Module):
    """Two convolutions with ReLU between them, as a residual; size: of the second."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block2(relu(self.block1(x)))
        return out


class Level(nn.Module):
    """One feature: perhaps half the size, a change of width, then residual blocks."""

    def __init__(self, spec: T2IAdapterSpec, width_in: int, width: int, halves: bool) -> None:
        super().__init__()
        inner = width // 4 if spec.light else width
        self.halves = halves
        changes = spec.light or width_in != width
        self.in_conv = nn.Conv2d(width_in, inner, 1) if changes else nn.Identity()
        self.resnets = module_list(ResBlock(inner, 3 if spec.light else 1) for _ in range(spec.res_blocks))
        self.out_conv = nn.Conv2d(inner, width, 1) if spec.light else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C_in, h, w) -> (B, C, h', w')."""
        x = self.in_conv(avg_pool2d(x, 2, ceil_mode=True) if self.halves else x)
        for block in self.resnets:
            x = block(x)
        out: Tensor = self.out_conv(x)
        return out


class T2IAdapter(nn.Module):
    """Features of control images for a UNet's encoder."""

    def __init__(self, spec: T2IAdapterSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.image_channels * spec.factor**2
        self.conv_in: nn.Module = nn.Identity()
        if not spec.light:
            self.conv_in = nn.Conv2d(width, spec.channels[0], 3, padding=1)
            width = spec.channels[0]
        widths = (width, *spec.channels)
        self.body = module_list(
            Level(spec, widths[level], widths[level + 1], halves) for level, halves in enumerate(spec.halves)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        (weight, *_) = self.parameters()
        return weight.dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, C, H, W) in [0, 1] -> a feature of each level, (B, C', h, w).

        Sides that are no multiple of the factor are continued with their last pixels.
        """
        factor = self.spec.factor
        bottom, right = (-side % factor for side in images.shape[-2:])
        x = pixel_unshuffle(pad(images, (0, right, 0, bottom), mode="replicate"), factor)
        x, features = self.conv_in(x), []
        for level in self.body:
            x = level(x)
            features.append(x)
        return tuple(features)

"""The autoencoder: E takes a picture to a latent, D takes it back (Rombach et al. 2021, section 3.1).

Module names equal the keys of the published CompVis checkpoints.
"""

from __future__ import annotations

from itertools import pairwise, zip_longest

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    interpolate,
    pad,
    pixel_shuffle,
    pixel_unshuffle,
    scaled_dot_product_attention,
)

from models.networks.kernels import group_norm
from models.spec import AutoencoderSpec

CELLS = 4096  # whose distances to all codes are taken at once


def norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two convolutions as a residual."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(width_in, groups)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = norm(width_out, groups)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(group_norm(x, self.norm1, activate=True))
        h = self.conv2(group_norm(h, self.norm2, activate=True))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """One-head self-attention over all cells, as a residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(width, groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w)."""
        y = group_norm(x, self.norm)
        q, k, v = (conv(y).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        y = scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, C)
        return x + self.proj_out(y[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:]))


class Middle(nn.Module):
    """Residual block, attention unless there is none, residual block."""

    def __init__(self, width: int, groups: int, attends: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups)
        self.attn_1 = AttentionBlock(width, groups) if attends else nn.Identity()
        self.block_2 = ResnetBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Half the size by a strided convolution, padded on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each with attention after it if the level attends."""

    def __init__(self, width_in: int, width_out: int, blocks: int, groups: int, attends: bool) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(width_out, groups) for _ in self.block if attends)

    def forward(self, x: Tensor) -> Tensor:
        for block, attend in zip_longest(self.block, self.attn):
            x = block(x)
            x = attend(x) if attend else x
        if hasattr(self, "downsample"):
            return self.downsample(x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Encoder(nn.Module):
    """Picture to its latent; with a Gaussian one, to its mean and log-variance."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        width, self.patch_size = spec.channels[0], spec.patch_size
        self.conv_in = nn.Conv2d(spec.picture_channels * spec.patch_size**2, width, 3, padding=1)
        self.down = nn.ModuleList()
        for index, out in enumerate(spec.channels):
            level = Level(width, out, spec.res_blocks, spec.groups, index in spec.attention_levels)
            if index < len(spec.channels) - 1:
                level.downsample = Downsample(out)
            self.down.append(level)
            width = out
        self.mid = Middle(width, spec.groups, spec.middle_attention)
        self.norm_out = norm(width, spec.groups)
        out = spec.z_channels if spec.codes else 2 * spec.z_channels
        self.conv_out = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(pixel_unshuffle(x, self.patch_size))
        for level in self.down:
            h = level(h)
        return self.conv_out(group_norm(self.mid(h), self.norm_out, activate=True))


class Decoder(nn.Module):
    """Latent to picture."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        width, self.patch_size = spec.channels[-1], spec.patch_size
        self.conv_in = nn.Conv2d(spec.z_channels, width, 3, padding=1)
        self.mid = Middle(width, spec.groups, spec.middle_attention)
        levels = []
        for index, out in reversed(list(enumerate(spec.channels))):
            level = Level(width, out, spec.res_blocks + 1, spec.groups, index in spec.attention_levels)
            if index:
                level.upsample = Upsample(out)
            levels.append(level)
            width = out
        self.up = nn.ModuleList(reversed(levels))  # the published index counts from the finest
        self.norm_out = norm(width, spec.groups)
        self.conv_out = nn.Conv2d(width, spec.picture_channels * spec.patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        h = self.conv_out(group_norm(h, self.norm_out, activate=True))
        return pixel_shuffle(h, self.patch_size)


class Codebook(nn.Module):
    """The vectors that a VQ latent's cells become (van den Oord et al. 2017, equation 1)."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)

    def forward(self, z: Tensor) -> Tensor:
        """Each cell's nearest code: z (B, C, h, w) -> (B, C, h, w)."""
        cells = z.movedim(1, -1)
        # A distance to every code takes memory: so many cells at a time.
        nearest = torch.cat([self.nearest(part) for part in cells.flatten(0, 2).split(CELLS)])
        return self.embedding(nearest).unflatten(0, cells.shape[:3]).movedim(-1, 1).contiguous()

    def nearest(self, cells: Tensor) -> Tensor:
        """cells (N, C) -> (N,) numbers of codes. |z|^2, the same for every code, is left out."""
        codes = self.embedding.weight.float()
        return (codes.square().sum(dim=1) - 2 * cells.float() @ codes.T).argmin(dim=1)


class Autoencoder(nn.Module):
    """E and D with a Gaussian latent, or with a codebook that D looks its cells up in."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        self.spec = spec
        inner, latent, parts = spec.z_channels, spec.latent_channels, 1 if spec.codes else 2
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        if spec.codes:
            self.quantize = Codebook(spec.codes, latent)
        self.quant_conv = nn.Conv2d(parts * inner, parts * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, inner, 1)

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held in."""
        return self.post_quant_conv.weight.dtype

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of a Gaussian latent: x (B, 3, H, W) in [-1, 1] -> mean and log-variance, each (B, C, H/f, W/f),
        unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x.to(self.dtype))).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x: Tensor) -> Tensor:
        """The latent's mode, or before its cells are looked up: x (B, 3, H, W) in [-1, 1] ->
        (B, C, H/f, W/f), unscaled."""
        if self.spec.codes:
            return self.quant_conv(self.encoder(x.to(self.dtype)))
        return self.moments(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled z (B, C, h, w) -> x (B, 3, f*h, f*w), about in [-1, 1]. Looks cells up first."""
        z = self.quantize(z) if self.spec.codes else z
        return self.decoder(self.post_quant_conv(z.to(self.dtype)))

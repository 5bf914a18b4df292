"""The autoencoder: E encodes an image to a latent, D decodes it (Rombach et al. 2021, section 3.1).

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
)

from models.networks.attention_backends import attend
from models.networks.kernels import conv_add, conv_norm, from_tokens, group_norm, to_tokens
from models.networks.modules import module_list
from models.spec import AutoencoderSpec

CELLS_PER_LOOKUP = 4096  # latent cells whose distances to all codes are in memory at once


def norm(width: int, groups: int) -> nn.GroupNorm:
    """The autoencoder's GroupNorm, with its published epsilon."""
    return nn.GroupNorm(groups, width, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(width_in, groups)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = norm(width_out, groups)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C_in, h, w) -> (B, C_out, h, w)."""
        h = conv_norm(group_norm(x, self.norm1, activate=True), self.conv1, self.norm2)
        return conv_add(h, self.conv2, x, getattr(self, "nin_shortcut", nn.Identity()))


class AttentionBlock(nn.Module):
    """One-head self-attention over all cells, with a residual connection."""

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
        # each (B, 1, h*w, C): one head
        q, k, v = (to_tokens(y, conv)[:, None] for conv in (self.q, self.k, self.v))
        y = attend(q, k, v)[:, 0]  # (B, h*w, C)
        return x + from_tokens(y, self.proj_out, x.shape[-2:])


class Middle(nn.Module):
    """Residual block, attention where the spec has it, residual block."""

    def __init__(self, width: int, groups: int, attends: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups)
        self.attn_1 = AttentionBlock(width, groups) if attends else nn.Identity()
        self.block_2 = ResnetBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Downsample(nn.Module):
    """Half the size by a strided convolution, padded only on the right and at the bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    downsample: Downsample  # of every level of the encoder but the last
    upsample: Upsample  # of every level of the decoder but the finest

    def __init__(self, width_in: int, width_out: int, blocks: int, groups: int, attends: bool) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * blocks
        self.block = module_list(ResnetBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = module_list(AttentionBlock(width_out, groups) for _ in self.block if attends)

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip_longest(self.block, self.attn):
            x = block(x)
            x = attention(x) if attention else x
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        elif hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    """Image -> latent before quant_conv; for a Gaussian latent, mean and log-variance."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        width, self.patch_size = spec.channels[0], spec.patch_size
        self.conv_in = nn.Conv2d(spec.image_channels * spec.patch_size**2, width, 3, padding=1)
        levels = []
        for index, out in enumerate(spec.channels):
            level = Level(width, out, spec.res_blocks, spec.groups, index in spec.attention_levels)
            if index < len(spec.channels) - 1:
                level.downsample = Downsample(out)
            levels.append(level)
            width = out
        self.down = module_list(levels)
        self.mid = Middle(width, spec.groups, spec.middle_attention)
        self.norm_out = norm(width, spec.groups)
        out = spec.z_channels if spec.codes else 2 * spec.z_channels
        self.conv_out = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) -> (B, C, H/f, W/f), C z_channels, or twice as many for a Gaussian latent."""
        h = self.conv_in(pixel_unshuffle(x, self.patch_size))
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(group_norm(self.mid(h), self.norm_out, activate=True))
        return out


class Decoder(nn.Module):
    """Latent after post_quant_conv -> image."""

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
        self.up = module_list(reversed(levels))  # published keys number levels from the finest
        self.norm_out = norm(width, spec.groups)
        self.conv_out = nn.Conv2d(width, spec.image_channels * spec.patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, z_channels, h, w) -> x (B, 3, f*h, f*w)."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        h = self.conv_out(group_norm(h, self.norm_out, activate=True))
        return pixel_shuffle(h, self.patch_size)


class Codebook(nn.Module):
    """Vector quantisation (van den Oord et al. 2017, equation 1)."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)

    def forward(self, z: Tensor) -> Tensor:
        """Replaces each cell by its nearest code: z (B, C, h, w) -> (B, C, h, w)."""
        cells = z.movedim(1, -1)  # (B, h, w, C)
        flat = cells.flatten(0, 2)  # (B*h*w, C)
        nearest = torch.cat([self.nearest(part) for part in flat.split(CELLS_PER_LOOKUP)])
        codes: Tensor = self.embedding(nearest)
        quantised: Tensor = codes.unflatten(0, cells.shape[:3]).movedim(-1, 1).contiguous()
        return quantised

    def nearest(self, cells: Tensor) -> Tensor:
        """cells (N, C) -> index of the nearest code (N,).

        The distance |z - e|^2 is compared without |z|^2, which is the same for all codes e.
        """
        codes = self.embedding.weight.float()
        return (codes.square().sum(dim=1) - 2 * cells.float() @ codes.T).argmin(dim=1)


class Autoencoder(nn.Module):
    """Encoder and decoder, with a Gaussian latent (KL) or a codebook that quantises it (VQ)."""

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
        """The dtype of the weights."""
        return self.post_quant_conv.weight.dtype

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of a Gaussian latent, unscaled.

        x (B, 3, H, W) in [-1, 1] -> two tensors (B, C, H/f, W/f).
        """
        mean, logvar = self.quant_conv(self.encoder(x.to(self.dtype))).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x: Tensor) -> Tensor:
        """The mode of a Gaussian latent, or a VQ latent before quantisation, unscaled.

        x (B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f).
        """
        if not self.spec.codes:
            return self.moments(x)[0]
        z: Tensor = self.quant_conv(self.encoder(x.to(self.dtype)))
        return z

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled z (B, C, h, w) -> x (B, 3, f*h, f*w), about in [-1, 1]. VQ quantises z first."""
        return self.decode_quantised(self.quantize(z) if self.spec.codes else z)

    def decode_quantised(self, z: Tensor) -> Tensor:
        """As decode(), of a latent that is quantised already if this autoencoder has a codebook."""
        x: Tensor = self.decoder(self.post_quant_conv(z.to(self.dtype)))
        return x

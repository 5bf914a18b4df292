"""The time-conditional UNet with cross-attention (Rombach et al. 2021, section 3.2 and figure 3).

Module names equal the keys of the published CompVis checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.attention import SpatialTransformer
from models.spec import UNetSpec


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the timestep, cosines first. t (B,), integer or float -> (B, width) float32."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32)
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions around an added timestep embedding, as a residual."""

    def __init__(self, width_in: int, width_out: int, embedding_width: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, width_in), nn.SiLU(), nn.Conv2d(width_in, width_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_width, width_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, width_out),
            nn.SiLU(),
            nn.Identity(),  # the reference's dropout: it keeps the published key `out_layers.3`
            nn.Conv2d(width_out, width_out, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C_in, h, w), emb (B, E) -> (B, C_out, h, w)."""
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """Half the size by a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Sequential):
    """Layers in a row, each given what it takes besides x."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """eps (or v) of a noised latent, given its timestep and a context."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        width, embedding = spec.channels[0], 4 * spec.channels[0]
        levels = range(len(spec.channels))

        def res_block(width_in: int, width_out: int) -> ResBlock:
            return ResBlock(width_in, width_out, embedding, spec.groups)

        def transformer(level: int, depth: int) -> list[nn.Module]:
            return [
                SpatialTransformer(
                    spec.channels[level], spec.context_width, spec.heads[level], depth,
                    spec.groups, spec.linear_projection,
                )
            ] if depth else []  # fmt: skip

        self.time_embed = nn.Sequential(
            nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(spec.in_channels, width, 3, padding=1))])
        skips = [width]  # widths of what goes across to the upward path
        for level in levels:
            for _ in range(spec.res_blocks):
                blocks = transformer(level, spec.transformer_depth[level])
                self.input_blocks.append(Stage(res_block(width, spec.channels[level]), *blocks))
                width = spec.channels[level]
                skips.append(width)
            if level != levels[-1]:
                self.input_blocks.append(Stage(Downsample(width)))
                skips.append(width)

        self.middle_block = Stage(
            res_block(width, width), *transformer(levels[-1], spec.middle_depth), res_block(width, width)
        )

        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for index in range(spec.res_blocks + 1):
                blocks = transformer(level, spec.transformer_depth[level])
                if level and index == spec.res_blocks:
                    blocks.append(Upsample(spec.channels[level]))
                self.output_blocks.append(
                    Stage(res_block(width + skips.pop(), spec.channels[level]), *blocks)
                )
                width = spec.channels[level]

        self.out = nn.Sequential(
            nn.GroupNorm(spec.groups, width), nn.SiLU(), nn.Conv2d(width, spec.out_channels, 3, padding=1)
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held in."""
        return self.out[2].weight.dtype

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, C_in, h, w), t (B,), context (B, L, C_ctx) -> (B, C_out, h, w)."""
        emb = self.time_embed(timestep_embedding(t, self.spec.channels[0]).to(self.dtype))
        x = x.to(self.dtype)
        context = None if context is None else context.to(self.dtype)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)

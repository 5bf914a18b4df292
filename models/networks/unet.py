"""The time-conditional UNet (Rombach et al. 2021, section 3.2 and figure 3).

Module names equal the keys of the published CompVis checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, silu

from models.networks.adapter_inputs import AdapterInputs, ImageTokens
from models.networks.attention import (
    AttentionBlock,
    SpatialTransformer,
    cross_attentions,
    number_columns,
)
from models.networks.deep_features import DeepFeatures
from models.networks.kernels import group_norm
from models.networks.modules import first_norm, module_list
from models.spec import UNetSpec


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the timestep, cosines first (Vaswani et al. 2017, section 3.5).

    t (B,), integer or float -> (B, width) float32.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32)
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Sinusoids of a guidance scale, sines first (Luo et al. 2023, section 4.1).

    scale (B,), 1 is no guidance -> (B, width) float32.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000) / (half - 1) * torch.arange(half, device=scale.device, dtype=torch.float32)
    )
    angles = 1000 * (scale.float()[:, None] - 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeEmbedding(nn.Sequential):
    """Sinusoids of the timestep -> embedding, with or without a projected guidance scale."""

    def __init__(self, width: int, embedding: int, guidance_width: int) -> None:
        super().__init__(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if guidance_width:
            self.cond_proj = nn.Linear(guidance_width, width, bias=False)

    def forward(self, sinusoids: Tensor, guidance: Tensor | None = None) -> Tensor:
        """sinusoids (B, C), of the timestep; guidance (B, C_g), of the guidance scale -> (B, E)."""
        if guidance is not None:
            sinusoids = sinusoids + self.cond_proj(guidance)
        out: Tensor = self[2](self[1](self[0](sinusoids)))
        return out


def same(x: Tensor) -> Tensor:
    """No change of size."""
    return x


def halve(x: Tensor) -> Tensor:
    """Half the size: the mean of each 2x2 square of cells."""
    return avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """Twice the size by nearest neighbour."""
    return interpolate(x, scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding between them and a residual connection.

    resize: changes the size, before the first convolution and on the skip connection. scale_shift: the
    embedding scales and shifts the second norm's output, instead of being added to its input.
    """

    def __init__(
        self, width_in: int, width_out: int, embedding_width: int, groups: int, scale_shift: bool = False,
        resize: Callable[[Tensor], Tensor] = same,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, width_in), nn.SiLU(), nn.Conv2d(width_in, width_out, 3, padding=1)
        )
        embedded = 2 * width_out if scale_shift else width_out
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_width, embedded))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, width_out),
            nn.SiLU(),
            nn.Identity(),  # the reference's dropout: it keeps the published key `out_layers.3`
            nn.Conv2d(width_out, width_out, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C_in, h, w), emb (B, E) -> (B, C_out, h', w')."""
        h = self.in_layers[2](self.resize(group_norm(x, first_norm(self.in_layers), activate=True)))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = silu(group_norm(h, first_norm(self.out_layers)) * (1 + scale) + shift)
        else:
            h = group_norm(h + emb, first_norm(self.out_layers), activate=True)
        out: Tensor = self.skip_connection(self.resize(x)) + self.out_layers[3](h)
        return out


class Downsample(nn.Module):
    """Half the size by a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """x (B, C, h, w) -> (B, C, *size); size: (2h, 2w), or one less where an odd side was halved."""
        out: Tensor = self.conv(double(x)[..., : size[0], : size[1]])
        return out


class Stage(nn.ModuleList):
    """Layers in sequence. Residual blocks get the timestep embedding, transformers the context."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None,
        size: torch.Size | None = None,
        images: Sequence[ImageTokens] = (),
    ) -> Tensor:
        """x (B, C_in, h, w), emb (B, E), context (B, L, C_ctx) -> (B, C_out, h', w'); size: (h', w')
        after upsampling; images: image tokens for cross-attention.
        """
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, images)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


def attention(spec: UNetSpec, level: int, depth: int, cross_only: bool = False) -> list[nn.Module]:
    """The attention after a residual block of a level: one module, or none where depth is 0."""
    width, heads = spec.channels[level], spec.heads[level]
    if not depth:
        return []
    if not spec.context_width:
        return [AttentionBlock(width, heads, spec.groups)]
    return [
        SpatialTransformer(
            width, spec.context_width, heads, depth, spec.groups, spec.linear_projection, cross_only
        )
    ]


def res_block(
    spec: UNetSpec, width_in: int, width_out: int, resize: Callable[[Tensor], Tensor] = same
) -> ResBlock:
    return ResBlock(width_in, width_out, 4 * spec.channels[0], spec.groups, spec.scale_shift_norm, resize)


def time_layers(spec: UNetSpec, guidance_width: int = 0) -> TimeEmbedding:
    """Embed the sinusoids of the timestep."""
    return TimeEmbedding(spec.channels[0], 4 * spec.channels[0], guidance_width)


def label_layers(spec: UNetSpec) -> nn.Module | None:
    """Embed the noise level or the pooled vector; None where the UNet takes neither."""
    embedding = 4 * spec.channels[0]
    if spec.added_width:
        layers = (nn.Linear(spec.added_width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        return nn.Sequential(nn.Sequential(*layers))
    return nn.Embedding(spec.noise_levels, embedding) if spec.noise_levels else None


def skip_widths(spec: UNetSpec) -> list[int]:
    """Channels of the output of each input block, which are the skip connections."""
    widths = [spec.channels[0]]
    for level, width in enumerate(spec.channels):
        widths += [width] * (spec.res_blocks + (level < len(spec.channels) - 1))
    return widths


def crosses_only(spec: UNetSpec, level: int) -> bool:
    return bool(spec.cross_only and spec.cross_only[level])


def down_stages(spec: UNetSpec) -> Iterator[Stage]:
    """The input blocks."""
    width = spec.channels[0]
    yield Stage(nn.Conv2d(spec.in_channels, width, 3, padding=1))
    for level, after in enumerate(spec.channels):
        for _ in range(spec.res_blocks):
            blocks = attention(spec, level, spec.transformer_depth[level], crosses_only(spec, level))
            yield Stage(res_block(spec, width, after), *blocks)
            width = after
        if level < len(spec.channels) - 1:
            yield Stage(
                res_block(spec, width, width, halve) if spec.residual_resampling else Downsample(width)
            )


def middle_stage(spec: UNetSpec) -> Stage:
    width = spec.channels[-1]
    layers: list[nn.Module] = [res_block(spec, width, width) for _ in range(spec.middle_res_blocks)]
    if spec.middle_res_blocks == 2:
        layers[1:1] = attention(spec, len(spec.channels) - 1, spec.middle_depth)
    return Stage(*layers)


def up_stages(spec: UNetSpec) -> Iterator[Stage]:
    """The output blocks."""
    skips, before = skip_widths(spec), spec.channels[-1]
    for level, width in reversed(list(enumerate(spec.channels))):
        for index in range(spec.res_blocks + 1):
            blocks = attention(spec, level, spec.up_depth(level, index), crosses_only(spec, level))
            first, before = res_block(spec, before + skips.pop(), width), width
            if level and index == spec.res_blocks:
                blocks.append(
                    res_block(spec, width, width, double) if spec.residual_resampling else Upsample(width)
                )
            yield Stage(first, *blocks)


def embed(
    spec: UNetSpec,
    time_embed: TimeEmbedding,
    label_emb: nn.Module | None,
    t: Tensor,
    pooled: Tensor | None,
    noise_level: Tensor | None = None,
    guidance: Tensor | None = None,
) -> Tensor:
    """The embedding (B, E) of the timestep and of the pooled vector or noise level, one of each per row.

    guidance: (B,), the guidance scale, for a spec with a guidance_width.
    """
    dtype = time_embed[0].weight.dtype
    assert isinstance(dtype, torch.dtype)
    if guidance is not None:
        guidance = guidance_embedding(guidance, spec.guidance_width).to(dtype)  # (B, C_g)
    emb: Tensor = time_embed(timestep_embedding(t, spec.channels[0]).to(dtype), guidance)
    if label_emb is not None and pooled is not None:
        emb = emb + label_emb(pooled.to(dtype))
    if label_emb is not None and noise_level is not None:
        emb = emb + label_emb(noise_level)
    return emb


class UNet(nn.Module):
    """Predicts eps or v of a noised latent from its timestep, context, pooled vector and noise level."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.time_embed = time_layers(spec, spec.guidance_width)
        self.label_emb = label_layers(spec)
        self.input_blocks = module_list(down_stages(spec))
        self.middle_block = middle_stage(spec)
        self.output_blocks = module_list(up_stages(spec))
        width = spec.channels[0]
        self.out = nn.Sequential(
            nn.GroupNorm(spec.groups, width), nn.SiLU(), nn.Conv2d(width, spec.out_channels, 3, padding=1)
        )
        number_columns(cross_attentions(self))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return first_norm(self.out).weight.dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        noise_level: Tensor | None = None,
        adapters: AdapterInputs | None = None,
        guidance: Tensor | None = None,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """x (B, C_in, h, w) with the concat channels, t (B,) -> (B, C_out, h, w).

        context: (B, L, C_ctx); pooled: (B, spec.added_width), added to the timestep embedding; noise_level:
        (B,); adapters: inputs of B rows from adapters; guidance: (B,), the guidance scale, for a spec with a
        guidance_width; deep: deep features to keep, or to take in place of the deep blocks.
        """
        emb = embed(self.spec, self.time_embed, self.label_emb, t, pooled, noise_level, guidance)
        adapters = adapters or AdapterInputs()
        deep = deep or DeepFeatures()
        images, count = adapters.images, len(self.input_blocks)
        shallow = count if deep.reused is None else deep.branch + 1  # input blocks that run
        x = x.to(self.dtype)
        context = None if context is None else context.to(self.dtype)
        skips = []
        for index, stage in zip(range(shallow), self.input_blocks, strict=False):
            x = adapters.after_block(index, stage(x, emb, context, images=images))
            skips.append(x)
        if deep.reused is None:
            x = adapters.after_middle(self.middle_block(x, emb, context, images=images))
        else:
            x = deep.reused
        skips = adapters.after_encoder(skips)
        for stage in islice(self.output_blocks, count - shallow, None):
            deep.after_block(len(skips) - 1, x)
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, emb, context, skips[-1].shape[-2:] if skips else None, images)
        out: Tensor = self.out[2](group_norm(x, first_norm(self.out), activate=True))
        return out

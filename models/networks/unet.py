"""The time-conditional UNet (Rombach et al. 2021, section 3.2 and figure 3).

Module names equal the keys of the published CompVis checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from models.networks.adapter_inputs import AdapterInputs
from models.networks.attention import (
    AttentionBlock,
    CrossInputs,
    SpatialTransformer,
    context_keys_values,
    cross_attentions,
    number_columns,
    shared_attention_inputs,
)
from models.networks.deep_features import DeepFeatures
from models.networks.kernels import group_norm
from models.networks.modules import first_norm, module_list
from models.networks.res_block import (
    Embeddings,
    ResBlock,
    double,
    embedding_layers,
    embeddings,
    halve,
    res_blocks,
    same,
)
from models.networks.stacked import Layers, stack, stack_like
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
    """Layers in sequence. Residual blocks get their embedding, transformers what they attend to."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(
        self,
        x: Tensor,
        emb: Embeddings,
        inputs: CrossInputs,
        size: torch.Size | None = None,
    ) -> Tensor:
        """x (B, C_in, h, w) -> (B, C_out, h', w'); size: (h', w') after upsampling."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb[layer])
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, inputs)
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


def shared_inputs(network: nn.Module) -> Iterator[Layers]:
    """The linear layers of a UNet or ControlNet that get the same input, in the order of the network."""
    if blocks := res_blocks(network):
        yield embedding_layers(blocks)
    yield from shared_attention_inputs(network)


def stack_layers(network: nn.Module) -> None:
    """Make one product of the layers that get the same input; again after a change of device or dtype."""
    for layers in shared_inputs(network):
        stack(layers)


def stack_layers_like(network: nn.Module, base: nn.Module) -> None:
    """Stack what is stacked in `base`, from which the network has those weights that did not change."""
    for layers, originals in zip(shared_inputs(network), shared_inputs(base), strict=True):
        stack_like(layers, originals)


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

    def embed(
        self,
        t: Tensor,
        pooled: Tensor | None = None,
        noise_level: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The embedding (B, E) of the inputs of forward() with these names."""
        return embed(self.spec, self.time_embed, self.label_emb, t, pooled, noise_level, guidance)

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
        keys_values: Tensor | None = None,
        emb: Tensor | None = None,
    ) -> Tensor:
        """x (B, C_in, h, w) with the concat channels, t (B,) -> (B, C_out, h, w).

        context: (B, L, C_ctx); pooled: (B, spec.added_width), added to the timestep embedding; noise_level:
        (B,); adapters: inputs of B rows from adapters; guidance: (B,), the guidance scale, for a spec with a
        guidance_width; deep: deep features to keep, or to take in place of the deep blocks; keys_values:
        (B, 2, L, W), those of the context, which is not needed then; emb: (B, E), from embed(), in place of
        t, pooled, noise_level and guidance.
        """
        emb = self.embed(t, pooled, noise_level, guidance) if emb is None else emb.to(self.dtype)
        adapters = adapters or AdapterInputs()
        deep = deep or DeepFeatures()
        count = len(self.input_blocks)
        shallow = count if deep.reused is None else deep.branch + 1  # input blocks that run
        down, up = list(self.input_blocks)[:shallow], list(self.output_blocks)[count - shallow :]
        middle = [self.middle_block] if deep.reused is None else []
        embedded = embeddings(emb, (*down, *middle, *up))
        attended = self.cross_inputs(context, keys_values, adapters)
        x = x.to(self.dtype)
        skips = []
        for index, stage in enumerate(down):
            x = adapters.after_block(index, stage(x, embedded, attended))
            skips.append(x)
        if deep.reused is None:
            x = adapters.after_middle(self.middle_block(x, embedded, attended))
        else:
            x = deep.reused
        skips = adapters.after_encoder(skips)
        for stage in up:
            deep.after_block(len(skips) - 1, x)
            x = torch.cat([x, skips.pop()], dim=1)
            x = stage(x, embedded, attended, skips[-1].shape[-2:] if skips else None)
        out: Tensor = self.out[2](group_norm(x, first_norm(self.out), activate=True))
        return out

    def cross_inputs(
        self, context: Tensor | None, keys_values: Tensor | None, adapters: AdapterInputs
    ) -> CrossInputs:
        """What cross-attention attends to, in the dtype of the weights."""
        context, keys_values = (None if x is None else x.to(self.dtype) for x in (context, keys_values))
        return CrossInputs(context, keys_values, adapters.images)

    def keys_values(self, context: Tensor) -> Tensor:
        """The keys and values (B, 2, L, W) of a context (B, L, C_ctx), for all calls with this context."""
        return context_keys_values(cross_attentions(self), context.to(self.dtype))

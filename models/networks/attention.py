"""Self- and cross-attention, and the spatial transformer through which the context enters the UNet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.networks.adapter_inputs import ImageTokens
from models.networks.attention_backends import attend
from models.networks.kernels import add_norm, from_tokens, geglu, group_norm, to_tokens
from models.networks.modules import module_list
from models.networks.stacked import Layers, products


@dataclass(frozen=True)
class CrossInputs:
    """What cross-attention attends to.

    context: (B, L, C_ctx). keys_values: (B, 2, L, W), the keys and values of the context for all layers, in
    place of the context; CrossAttention.columns says which are a layer's. images: tokens that are attended to
    separately.
    """

    context: Tensor | None = None
    keys_values: Tensor | None = None
    images: Sequence[ImageTokens] = ()


class CrossAttention(nn.Module):
    """Multi-head attention from x to a context, or to x itself (Rombach et al. 2021, section 3.3)."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.columns = slice(0, width)  # of this layer in CrossInputs.keys_values and in ImageTokens

    def forward(self, x: Tensor, inputs: CrossInputs | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C). inputs: what x attends to, or None for x itself."""
        if inputs is None:
            q, k, v = products(x, (self.to_q, self.to_k, self.to_v))
        else:
            q, (k, v) = self.to_q(x), self.keys_values(inputs)
        # each (B, heads, tokens, C / heads)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        attended = attend(q, k, v)
        for image in inputs.images if inputs else ():
            attended = attended + image.attend(q, self.columns)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out

    def keys_values(self, inputs: CrossInputs) -> Sequence[Tensor]:
        """The keys and the values of the context, (B, L, C) each."""
        if inputs.keys_values is not None:
            return inputs.keys_values[..., self.columns].unbind(1)
        assert inputs.context is not None
        return products(inputs.context, (self.to_k, self.to_v))


class AttentionBlock(nn.Module):
    """Self-attention over the cells of a feature map, as a residual (Dhariwal and Nichol 2021, section 3)."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w)."""
        y = to_tokens(group_norm(x, self.norm), self.qkv)  # (B, h*w, 3 C)
        # The published weights hold q, k and v of the first head, then those of the next.
        y = y.unflatten(2, (self.heads, 3, -1)).transpose(1, 2)  # (B, heads, h*w, 3, C / heads)
        y = attend(*y.unbind(3)).transpose(1, 2).flatten(2)  # (B, h*w, C)
        return x + from_tokens(y, self.proj_out, x.shape[-2:])


class GEGLU(nn.Module):
    """A linear layer whose first half is gated by the exact GELU of its second (Shazeer 2020)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, inner)."""
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU, then a linear layer; four times as wide between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The middle entry is the reference's dropout: it keeps the published key `net.2`.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        out: Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each behind a LayerNorm and a residual.

    cross_only: the first attention is to the context as well.
    """

    def __init__(self, width: int, context_width: int, heads: int, cross_only: bool = False) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = CrossAttention(width, context_width if cross_only else width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context_width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, inputs: CrossInputs) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        y = self.attn1(self.norm1(x), replace(inputs, images=()) if self.cross_only else None)
        x, y = add_norm(x, y, self.norm2)
        x, y = add_norm(x, self.attn2(y, inputs), self.norm3)
        out: Tensor = x + self.ff(y)
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the cells of a feature map, as a residual."""

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        depth: int,
        groups: int,
        linear: bool,
        cross_only: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = module_list(
            TransformerBlock(width, context_width, heads, cross_only) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, inputs: CrossInputs) -> Tensor:
        """x (B, C, h, w) -> (B, C, h, w)."""
        y = to_tokens(group_norm(x, self.norm), self.proj_in)  # (B, h*w, C)
        for block in self.transformer_blocks:
            y = block(y, inputs)
        return x + from_tokens(y, self.proj_out, x.shape[-2:])


def transformer_blocks(network: nn.Module) -> Iterator[TransformerBlock]:
    return (module for module in network.modules() if isinstance(module, TransformerBlock))


def cross_attentions(network: nn.Module) -> list[CrossAttention]:
    """The layers of a network that attend to the context, in the network's order.

    Those that can attend to image tokens as well come first.
    """
    blocks = list(transformer_blocks(network))
    return [block.attn2 for block in blocks] + [block.attn1 for block in blocks if block.cross_only]


def context_keys_values(layers: Sequence[CrossAttention], context: Tensor) -> Tensor:
    """The keys and values (B, 2, L, W) of a context (B, L, C_ctx), layer after layer."""
    pairs = (layer.keys_values(CrossInputs(context)) for layer in layers)
    return torch.stack([torch.cat(each, dim=-1) for each in zip(*pairs, strict=True)], dim=1)


def shared_attention_inputs(network: nn.Module) -> Iterator[Layers]:
    """Linear layers that get the same input: queries, keys and values of self-attention; keys and values."""
    for block in transformer_blocks(network):
        for layer in (block.attn1, block.attn2):
            crosses = layer is block.attn2 or block.cross_only
            yield (layer.to_k, layer.to_v) if crosses else (layer.to_q, layer.to_k, layer.to_v)


def number_columns(layers: Iterable[CrossAttention]) -> None:
    """Give each layer its columns in CrossInputs.keys_values and ImageTokens, one layer after the other."""
    start = 0
    for layer in layers:
        layer.columns = slice(start, start + layer.to_q.out_features)
        start = layer.columns.stop

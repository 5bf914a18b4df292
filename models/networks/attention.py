"""Self- and cross-attention, and the spatial transformer through which the context enters the UNet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from models.networks.adapter_inputs import ImageTokens
from models.networks.attention_backends import attend
from models.networks.kernels import geglu, group_norm
from models.networks.modules import module_list


class CrossAttention(nn.Module):
    """Multi-head attention from x to a context, or to x itself (Rombach et al. 2021, section 3.3)."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.columns = slice(0, width)  # of this layer in ImageTokens

    def forward(self, x: Tensor, context: Tensor | None = None, images: Sequence[ImageTokens] = ()) -> Tensor:
        """x (B, N, C), context (B, L, C_ctx) -> (B, N, C). images: tokens that x attends to separately."""
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, C / heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        attended = attend(q, k, v)
        for image in images:
            attended = attended + image.attend(q, self.columns)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out


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
        y = self.qkv(group_norm(x, self.norm).flatten(2))  # (B, 3 C, h*w)
        # The published weights hold q, k and v of the first head, then those of the next.
        y = y.unflatten(1, (self.heads, 3, -1)).transpose(-1, -2)  # (B, heads, 3, h*w, C / heads)
        y = attend(*y.unbind(2)).transpose(-1, -2).flatten(1, 2)  # (B, C, h*w)
        out: Tensor = x + self.proj_out(y).unflatten(2, x.shape[-2:])
        return out


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

    def forward(self, x: Tensor, context: Tensor, images: Sequence[ImageTokens] = ()) -> Tensor:
        """x (B, N, C), context (B, L, C_ctx) -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x), context if self.cross_only else None)
        x = x + self.attn2(self.norm2(x), context, images)
        out: Tensor = x + self.ff(self.norm3(x))
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
        self.linear = linear
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = module_list(
            TransformerBlock(width, context_width, heads, cross_only) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor, images: Sequence[ImageTokens] = ()) -> Tensor:
        """x (B, C, h, w), context (B, L, C_ctx) -> (B, C, h, w)."""
        size = x.shape[-2:]
        y = group_norm(x, self.norm)
        y = y if self.linear else self.proj_in(y)
        y = y.flatten(2).transpose(1, 2)  # (B, h*w, C)
        y = self.proj_in(y) if self.linear else y
        for block in self.transformer_blocks:
            y = block(y, context, images)
        y = self.proj_out(y) if self.linear else y
        y = y.transpose(1, 2).unflatten(2, size)  # (B, C, h, w)
        out: Tensor = x + (y if self.linear else self.proj_out(y))
        return out


def cross_attentions(network: nn.Module) -> list[CrossAttention]:
    """The layers of a network that attend to the context, in the network's order."""
    return [block.attn2 for block in network.modules() if isinstance(block, TransformerBlock)]


def number_columns(layers: Iterable[CrossAttention]) -> None:
    """Give each layer its columns in ImageTokens, one layer after the other."""
    start = 0
    for layer in layers:
        layer.columns = slice(start, start + layer.to_q.out_features)
        start = layer.columns.stop

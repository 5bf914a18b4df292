"""The paper's transformer over tokens of text or boxes (Rombach et al. 2021, appendix E.2).

Module names equal the keys of the published CompVis checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.attention_backends import attend
from models.networks.modules import module_list
from models.spec import TokenSpec


class TokenAttention(nn.Module):
    """Self-attention with a head width that does not depend on the input's width."""

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()
        self.heads, inner = spec.heads, spec.heads * spec.head_width
        self.to_q = nn.Linear(spec.width, inner, bias=False)
        self.to_k = nn.Linear(spec.width, inner, bias=False)
        self.to_v = nn.Linear(spec.width, inner, bias=False)
        self.to_out = nn.Linear(inner, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> (B, L, C)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, head_width)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out: Tensor = self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class TokenFeedForward(nn.Module):
    """Two linear layers with an exact GELU between them; four times as wide there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        # The middle entry is the reference's dropout: it keeps the published key `net.2`.
        self.net = nn.Sequential(inner, nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> (B, L, C)."""
        out: Tensor = self.net(x)
        return out


class TokenLayers(nn.Module):
    """Attention and feed-forward in turn, each behind a LayerNorm and with a residual connection.

    Published keys number each of the two as a layer of its own.
    """

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(spec.layers):
            layers += [TokenAttention(spec), TokenFeedForward(spec.width)]
        self.layers = module_list(nn.ModuleList([nn.LayerNorm(spec.width), layer]) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> (B, L, C)."""
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class TokenPositions(nn.Module):
    """One learned vector per position."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(tokens, width)

    def forward(self, length: int) -> Tensor:
        """The vectors of the first positions, (length, C)."""
        return self.emb.weight[:length]


class TokenTransformer(nn.Module):
    """Token ids -> one vector per token. Padding is not masked, as in the published training."""

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()
        self.spec = spec
        self.token_emb = nn.Embedding(spec.vocabulary, spec.width)
        self.pos_emb = TokenPositions(spec.tokens, spec.width)
        self.attn_layers = TokenLayers(spec)
        self.norm = nn.LayerNorm(spec.width)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.norm.weight.device

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, C), after the final LayerNorm."""
        states: Tensor = self.norm(self.attn_layers(self.token_emb(ids) + self.pos_emb(ids.shape[1])))
        return states

"""CLIP's transformer (Radford et al. 2021, section 2.4), with the output of every layer; for text here.

Module names equal the keys of the published `text_encoder/` folders without their prefix. `transformers` has
the same network, but importing it takes three seconds, longer than loading the bundled model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from models.networks.attention_backends import attend
from models.networks.modules import module_list
from models.spec import TextSpec


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class Embeddings(nn.Module):
    """The sum of a token embedding and a position embedding."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.position_embedding = nn.Embedding(spec.tokens, spec.width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, n) -> (B, n, C)."""
        vectors: Tensor = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        return vectors


class LayerSpec(Protocol):
    """Shape of the transformer's layers."""

    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def activation(self) -> str: ...


class Attention(nn.Module):
    """Self-attention; causal: to a token itself and to those before it only."""

    def __init__(self, spec: LayerSpec, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = spec.heads, causal
        self.k_proj = nn.Linear(spec.width, spec.width)
        self.v_proj = nn.Linear(spec.width, spec.width)
        self.q_proj = nn.Linear(spec.width, spec.width)
        self.out_proj = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n, C) -> (B, n, C)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, n, C / heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attend(q, k, v, causal=self.causal)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Two linear layers with the spec's activation between them."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.fc1 = nn.Linear(spec.width, spec.intermediate)
        self.fc2 = nn.Linear(spec.intermediate, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n, C) -> (B, n, C)."""
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and with a residual connection."""

    def __init__(self, spec: LayerSpec, causal: bool) -> None:
        super().__init__()
        self.self_attn = Attention(spec, causal)
        self.layer_norm1 = nn.LayerNorm(spec.width)
        self.mlp = FeedForward(spec)
        self.layer_norm2 = nn.LayerNorm(spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n, C) -> (B, n, C)."""
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Layers(nn.Module):
    """The layers in turn; returns the output of each."""

    def __init__(self, spec: LayerSpec, causal: bool) -> None:
        super().__init__()
        self.layers = module_list(Layer(spec, causal) for _ in range(spec.layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (B, n, C) -> x and the output of every layer, each (B, n, C)."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class TextTransformer(nn.Module):
    """Token ids -> every layer's output. The caller applies the final norm to those that it uses."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec)
        self.encoder = Layers(spec, causal=True)
        self.final_layer_norm = nn.LayerNorm(spec.width)

    def forward(self, ids: Tensor) -> list[Tensor]:
        """ids (B, n) -> the embeddings and the output of every layer, each (B, n, C)."""
        states: list[Tensor] = self.encoder(self.embeddings(ids))
        return states

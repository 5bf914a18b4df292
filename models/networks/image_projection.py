"""From a CLIP image encoder's output to image tokens beside the text's (Ye et al. 2023, section 3.2).

Module names equal the keys of the published files without their prefix image_proj.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.adapter_specs import IPAdapterSpec
from models.networks.attention_backends import attend
from models.networks.modules import module_list


class PlainProjection(nn.Module):
    """The image's vector -> tokens, by one linear layer."""

    def __init__(self, spec: IPAdapterSpec) -> None:
        super().__init__()
        self.proj = nn.Linear(spec.embedding_width, spec.tokens * spec.context_width)
        self.norm = nn.LayerNorm(spec.context_width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D) -> (B, n, C_ctx)."""
        out: Tensor = self.norm(self.proj(x).unflatten(-1, (-1, self.norm.weight.shape[0])))
        return out


class FullProjection(nn.Module):
    """The vector of each patch -> a token."""

    def __init__(self, spec: IPAdapterSpec) -> None:
        super().__init__()
        width = spec.embedding_width
        self.proj = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, spec.context_width),
            nn.LayerNorm(spec.context_width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n, D) -> (B, n, C_ctx)."""
        out: Tensor = self.proj(x)
        return out


class ResamplerAttention(nn.Module):
    """Attention from latents to the image's vectors and to themselves (Jaegle et al. 2021)."""

    def __init__(self, spec: IPAdapterSpec, inner: int) -> None:
        super().__init__()
        self.heads = spec.heads
        self.norm1 = nn.LayerNorm(spec.width)
        self.norm2 = nn.LayerNorm(spec.width)
        self.to_q = nn.Linear(spec.width, inner, bias=False)
        self.to_kv = nn.Linear(spec.width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, spec.width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """x (B, n, C), latents (B, m, C) -> (B, m, C)."""
        x, latents = self.norm1(x), self.norm2(latents)
        pair = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, C / heads)
            for y in (self.to_q(latents), *pair)
        )
        out: Tensor = self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class Resampler(nn.Module):
    """The vectors of all patches -> few tokens (IP-Adapter Plus)."""

    def __init__(self, spec: IPAdapterSpec) -> None:
        super().__init__()
        width = spec.width
        self.latents = nn.Parameter(torch.zeros(1, spec.tokens, width))
        self.proj_in = nn.Linear(spec.embedding_width, width)
        self.proj_out = nn.Linear(width, spec.context_width)
        self.norm_out = nn.LayerNorm(spec.context_width)
        self.layers = module_list(
            nn.ModuleList(
                [
                    ResamplerAttention(spec, HEAD_WIDTH * spec.heads),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, spec.intermediate, bias=False),
                        nn.GELU(),
                        nn.Linear(spec.intermediate, width, bias=False),
                    ),
                ]
            )
            for _ in range(spec.depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, n, D) -> (B, m, C_ctx)."""
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        out: Tensor = self.norm_out(self.proj_out(latents))
        return out


HEAD_WIDTH = 64  # of the resampler's attention, in all published files
PROJECTIONS: dict[str, type[nn.Module]] = {
    "plain": PlainProjection,
    "plus": Resampler,
    "full": FullProjection,
}


class IPAdapter(nn.Module):
    """Image tokens, and their keys and values for every cross-attention layer of a UNet."""

    def __init__(self, spec: IPAdapterSpec) -> None:
        super().__init__()
        self.spec = spec
        self.image_proj = PROJECTIONS[spec.kind](spec)
        self.keys = nn.Linear(spec.context_width, sum(spec.layers), bias=False)
        self.values = nn.Linear(spec.context_width, sum(spec.layers), bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.keys.weight.dtype

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The image encoder's output (B, D) or (B, n, D) -> keys and values, each (B, m, W)."""
        tokens = self.image_proj(embeddings.to(self.dtype))
        return self.keys(tokens), self.values(tokens)

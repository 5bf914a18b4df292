"""CLIP's image encoder (Radford et al. 2021, section 2.4): a vision transformer over patches.

Module names equal the keys of the published `image_encoder/` folders without the prefix vision_model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.adapter_specs import VisionSpec
from models.networks.clip import Layers


class Patches(nn.Module):
    """A vector for the whole image and one for each patch, plus their positions."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        size = spec.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(spec.width))
        self.patch_embedding = nn.Conv2d(3, spec.width, size, stride=size, bias=False)
        self.position_embedding = nn.Embedding(spec.tokens, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, S, S) -> (B, n, C)."""
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(x), 1, -1)
        out: Tensor = torch.cat([whole, patches], dim=1) + self.position_embedding.weight
        return out


class VisionTransformer(nn.Module):
    """Images -> their projected vectors, or the states of all patches before the last layer."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = Patches(spec)
        self.pre_layrnorm = nn.LayerNorm(spec.width)  # spelt so in the published files
        self.encoder = Layers(spec, causal=False)
        self.post_layernorm = nn.LayerNorm(spec.width)
        self.visual_projection = nn.Linear(spec.width, spec.projection, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.visual_projection.weight.dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, S, S), normalised -> (B, P) projected, and (B, n, C) before the last layer."""
        states = self.encoder(self.pre_layrnorm(self.embeddings(x.to(self.dtype))))
        return self.visual_projection(self.post_layernorm(states[-1][:, 0])), states[-2]

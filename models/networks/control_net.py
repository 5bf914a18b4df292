"""ControlNet (Zhang et al. 2023): a copy of the UNet's encoder that reads a control image.

Module names equal the keys of the published CompVis checkpoints. ControlNet++ (Zavadski et al. and Xin et al.
2024), one network for several kinds of control image, has names of its own here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from models.adapter_specs import ControlNetSpec
from models.networks.attention import CrossInputs
from models.networks.clip import quick_gelu
from models.networks.modules import module_list
from models.networks.res_block import embeddings
from models.networks.unet import (
    down_stages,
    embed,
    label_layers,
    middle_stage,
    skip_widths,
    time_layers,
    timestep_embedding,
)


@dataclass(frozen=True)
class ControlResiduals:
    """What a ControlNet adds to a UNet's skip connections and middle output, before any scale.

    skips: (B, C, h, w) for each input block; middle: (B, C, h, w).
    """

    skips: tuple[Tensor, ...]
    middle: Tensor


def hint_layers(spec: ControlNetSpec) -> nn.Sequential:
    """Convolutions from the control image to the size and width of the first input block."""
    widths = spec.hint_widths
    layers: list[nn.Module] = [nn.Conv2d(spec.hint_channels, widths[0], 3, padding=1)]
    for before, after in pairwise(widths):
        layers += [nn.SiLU(), nn.Conv2d(before, before, 3, padding=1)]
        layers += [nn.SiLU(), nn.Conv2d(before, after, 3, padding=1, stride=2)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(widths[-1], spec.unet.channels[0], 3, padding=1))


class TypeAttention(nn.Module):
    """Self-attention and feed-forward over a few tokens, each behind a LayerNorm and a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        out: Tensor = x + self.mlp["c_proj"](quick_gelu(self.mlp["c_fc"](self.ln_2(x))))
        return out


class TypeFusion(nn.Module):
    """Tells a ControlNet++ which kind of control image it reads.

    The published code has a token for each control image and one for the latent, but its attention runs over
    the rows of a batch, which are one image's, not over the tokens. So each token attends to itself, and the
    latent's is not used. Here the same holds for rows of different images.
    """

    def __init__(self, spec: ControlNetSpec) -> None:
        super().__init__()
        width, embedding = spec.unet.channels[0], 4 * spec.unet.channels[0]
        self.spec = spec
        self.task_embedding = nn.Parameter(torch.zeros(spec.control_types, width))
        self.transformer_layes = module_list(  # spelt so in the published files
            TypeAttention(width, spec.type_heads) for _ in range(spec.type_layers)
        )
        self.spatial_ch_projs = nn.Linear(width, width)
        self.control_add_embedding = nn.Sequential(
            nn.Linear(spec.control_types * spec.type_width, embedding),
            nn.SiLU(),
            nn.Linear(embedding, embedding),
        )

    def embed(self, types: Tensor) -> Tensor:
        """types (B,), integers -> (B, E), added to the timestep's embedding."""
        flags = one_hot(types, self.spec.control_types)  # (B, n)
        waves = timestep_embedding(flags.flatten(), self.spec.type_width).unflatten(0, flags.shape).flatten(1)
        out: Tensor = self.control_add_embedding(waves.to(self.task_embedding.dtype))
        return out

    def forward(self, hint: Tensor, types: Tensor) -> Tensor:
        """hint (B, C, h, w), shifted by a vector for its kind and content."""
        tokens = (hint.mean((2, 3)) + self.task_embedding[types])[:, None]  # (B, 1, C)
        for layer in self.transformer_layes:
            tokens = layer(tokens)
        shift: Tensor = self.spatial_ch_projs(tokens[:, 0])
        return hint + shift[:, :, None, None]


class ControlNet(nn.Module):
    """Predicts residuals for a UNet of spec.unet's shape from a control image."""

    def __init__(self, spec: ControlNetSpec) -> None:
        super().__init__()
        self.spec = spec
        unet = spec.unet
        self.time_embed = time_layers(unet)
        self.label_emb = label_layers(unet)
        self.input_blocks = module_list(down_stages(unet))
        self.input_hint_block = hint_layers(spec)
        self.zero_convs = module_list(
            nn.Sequential(nn.Conv2d(width, width, 1)) for width in skip_widths(unet)
        )
        self.middle_block = middle_stage(unet)
        self.middle_block_out = nn.Sequential(nn.Conv2d(unet.channels[-1], unet.channels[-1], 1))
        self.types = TypeFusion(spec) if spec.control_types else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        (weight, *_) = self.time_embed.parameters()
        return weight.dtype

    def embed_hint(self, images: Tensor) -> Tensor:
        """Control images (B, 3, H, W) in [0, 1] -> (B, C, h, w), for every step of a run."""
        hint: Tensor = self.input_hint_block(images.flip(1) if self.spec.bgr else images)
        return hint

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None,
        pooled: Tensor | None,
        hint: Tensor,
        types: Tensor | None = None,
    ) -> ControlResiduals:
        """x (B, C_z, h, w) without concat channels; t, context and pooled as the UNet gets them.

        hint: (B, C, h, w), as embed_hint() returns it; types: (B,), the kind of control image of each row,
        for a network that takes several.
        """
        emb = embed(self.spec.unet, self.time_embed, self.label_emb, t, pooled)
        inputs = CrossInputs(None if context is None else context.to(self.dtype))
        if self.types is not None:
            assert types is not None
            emb, hint = emb + self.types.embed(types), self.types(hint, types)
        embedded = embeddings(emb, (*self.input_blocks, self.middle_block))
        x = self.input_blocks[0](x.to(self.dtype), embedded, inputs) + hint
        skips: list[Tensor] = [self.zero_convs[0](x)]
        for block, zero_conv in zip(self.input_blocks[1:], self.zero_convs[1:], strict=True):
            x = block(x, embedded, inputs)
            skips.append(zero_conv(x))
        middle: Tensor = self.middle_block_out(self.middle_block(x, embedded, inputs))
        return ControlResiduals(tuple(skips), middle)

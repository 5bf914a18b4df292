"""What a request says, as a context for the UNet or as channels beside the latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, interpolate, pad
from transformers import BertTokenizer

from models.boxes import Box, tokens
from models.configs import CheckpointError
from models.spec import ClassSpec, Condition, SegmentationSpec, TokenSpec
from models.text_encoder import TextEncoder, TokenTransformer, overflow
from models.words import WANTED

GRAY = 128  # what a pixel under the mask is shown as to a UNet with mask channels


class Asked(NamedTuple):
    """What a picture is to show. Each conditioner hears what it is for."""

    prompt: str = ""
    negative_prompt: str = ""
    class_label: int | None = None  # None: of no class
    boxes: Sequence[Box] = ()
    regions: Tensor | None = None  # (rows, columns) of labels counted from 1, or 0 for none


class LayoutProjection(nn.Module):
    """Names -> the channels that their regions have beside the latent."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, channels)

    def forward(self, encoder: TextEncoder, ids: Tensor) -> Tensor:
        """ids (K, L) of names -> (K, channels): their text's last token, projected."""
        states = encoder(ids)
        last = (ids == encoder.spec.eos_id).int().argmax(dim=1)
        return self.projection(states[torch.arange(len(ids), device=ids.device), last])


class TextConditioner(nn.Module):
    """Prompts -> context, and where the model knows regions, labels -> channels beside the latent.

    The null context is that of the empty prompt; where there is no region, its channels are 0.
    """

    def __init__(
        self, encoder: TextEncoder, layout: LayoutProjection | None = None, labels: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.layout = layout
        self.labels = tuple(labels)

    def contexts(self, asked: Asked) -> Tensor:
        """Without guidance's condition and with it: (2, L, C)."""
        both = self([asked.negative_prompt, asked.prompt])
        # Where a text is one vector, guidance was published with 0 for no text (Blattmann et al. 2022).
        silent = self.encoder.spec.projection and not asked.negative_prompt
        return torch.stack([torch.zeros_like(both[0]), both[1]]) if silent else both

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, C), cut to the context length."""
        return self.from_ids(self.encoder.tokenize(prompts))

    def from_ids(self, ids: Tensor) -> Tensor:
        """Token ids (B, n) -> (B, L, C): a vector a token, or one of the whole text."""
        device = next(self.encoder.parameters()).device
        return self.encoder(ids.to(device=device, dtype=torch.long))

    def from_regions(self, regions: Tensor) -> Tensor:
        """regions (h, w), the number of a label counted from 1, or 0 for none -> (channels, h, w)."""
        device = next(self.parameters()).device
        present, index = regions.to(device).unique(return_inverse=True)
        ids = self.encoder.tokenize([self.labels[max(number - 1, 0)] for number in present.tolist()])
        table = self.layout(self.encoder, ids.to(device)) * (present > 0)[:, None]
        return table[index].movedim(-1, 0)

    def overflow(self, prompt: str) -> str:
        """The end of the prompt that the context length leaves out; '' if it fits."""
        return overflow(self.encoder.tokenizer, self.encoder.spec.tokens, prompt)


class TokenConditioner(nn.Module):
    """Prompts in BERT's words -> context. The null context is that of the empty prompt."""

    def __init__(self, spec: TokenSpec, tokenizer: BertTokenizer | None = None) -> None:
        super().__init__()
        self.transformer = TokenTransformer(spec)
        self.tokenizer = tokenizer

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Begin and end tokens added, padded and cut to the context length: (B, L) integers.

        Raises CheckpointError where there is no tokenizer: single files carry none.
        """
        if self.tokenizer is None:
            raise CheckpointError(WANTED)
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.transformer.spec.tokens, truncation=True
        )["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def contexts(self, asked: Asked) -> Tensor:
        """Without guidance's condition and with it: (2, L, C)."""
        return self([asked.negative_prompt, asked.prompt])

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, C)."""
        return self.from_ids(self.tokenize(prompts))

    def from_ids(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, C)."""
        return self.transformer(ids.to(device=self.transformer.device, dtype=torch.long))

    def overflow(self, prompt: str) -> str:
        """The end of the prompt that the context length leaves out; '' if it fits."""
        return overflow(self.tokenizer, self.transformer.spec.tokens, prompt)


class BoxConditioner(nn.Module):
    """Scenes of boxes -> context. There is no null context."""

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()
        self.transformer = TokenTransformer(spec)

    def contexts(self, asked: Asked) -> Tensor:
        """The same twice, for nothing guides: (2, L, C)."""
        return self([asked.boxes]).expand(2, -1, -1)

    def forward(self, scenes: Sequence[Sequence[Box]]) -> Tensor:
        """Boxes of each picture -> (B, L, C)."""
        return self.from_ids(torch.tensor([tokens(boxes, self.transformer.spec) for boxes in scenes]))

    def from_ids(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, C)."""
        return self.transformer(ids.to(device=self.transformer.device, dtype=torch.long))


class ClassConditioner(nn.Module):
    """Numbers of classes -> a context of one vector. The null context is that of the null class, if any."""

    def __init__(self, spec: ClassSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.classes, spec.width)

    def contexts(self, asked: Asked) -> Tensor:
        """Without guidance's condition and with it: (2, 1, C); the same twice where nothing guides."""
        told = self.spec.null if asked.class_label is None else asked.class_label
        return self([told if self.spec.null is None else self.spec.null, told])

    def forward(self, labels: Sequence[int] | Tensor) -> Tensor:
        """B numbers from 0 -> (B, 1, C)."""
        device = self.embedding.weight.device
        return self.embedding(torch.as_tensor(labels, dtype=torch.long, device=device))[:, None]


class SegmentationConditioner(nn.Module):
    """Maps of classes -> channels beside the latent: each class has a colour, and sizes are halved."""

    def __init__(self, spec: SegmentationSpec) -> None:
        super().__init__()
        self.spec = spec
        self.channel_mapper = nn.Conv2d(spec.classes, spec.channels, 1, bias=False)

    def contexts(self, asked: Asked) -> None:
        """It makes channels alone."""

    def forward(self, maps: Tensor) -> Tensor:
        """Numbers of classes from 0, (B, H, W) -> (B, C, H / 2^n, W / 2^n)."""
        return self.mixed(maps + 1)

    def from_regions(self, regions: Tensor) -> Tensor:
        """Numbers of classes from 1, 0 for none, (H, W) -> (C, H / 2^n, W / 2^n)."""
        return self.mixed(regions[None])[0]

    def mixed(self, maps: Tensor) -> Tensor:
        """As from_regions, of (B, H, W).

        The reference halves a channel a class and mixes them then; both are linear, so to look the colour up
        first is the same with far less memory.
        """
        weight = self.channel_mapper.weight
        colours = pad(weight.flatten(1).T, (0, 0, 1, 0))  # (1 + classes, C), none first
        y = embedding(maps.to(device=weight.device, dtype=torch.long), colours).movedim(-1, 1)
        for _ in range(self.spec.halvings):
            y = interpolate(y, scale_factor=0.5, mode="bilinear")
        return y


Conditioner = TextConditioner | TokenConditioner | BoxConditioner | ClassConditioner | SegmentationConditioner


def make_conditioner(condition: Condition | None) -> Conditioner | None:
    """What a condition goes through; None where it has no weights of its own."""
    if isinstance(condition, TokenSpec):
        return BoxConditioner(condition) if condition.objects else TokenConditioner(condition)
    if isinstance(condition, ClassSpec):
        return ClassConditioner(condition)
    return None if condition is None else SegmentationConditioner(condition)

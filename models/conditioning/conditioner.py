"""What a request says, as a context for the UNet or as channels beside the latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, interpolate, pad
from transformers import BertTokenizer

from models.conditioning.boxes import Box, tokens
from models.conditioning.prompts import Reading
from models.conditioning.text_encoder import Context, Reader, TextEncoder, TokenTransformer, weighed
from models.formats.companions import WANTED
from models.formats.diffusers_read import CheckpointError
from models.spec import ClassSpec, Condition, SegmentationSpec, TokenSpec

GRAY = 128  # what a pixel under the mask is shown as to a UNet with mask channels


class Asked(NamedTuple):
    """What a picture is to show. Each conditioner hears what it is for."""

    prompt: str = ""
    negative_prompt: str = ""
    class_label: int | None = None  # None: of no class
    boxes: Sequence[Box] = ()
    regions: Tensor | None = None  # (rows, columns) of labels counted from 1, or 0 for none
    size: tuple[int, int] | None = None  # (width, height) of the picture; None: the model's own
    reading: Reading = Reading()

    @property
    def prompts(self) -> tuple[str, str]:
        """Without guidance's condition and with it."""
        return self.negative_prompt, self.prompt


class LayoutProjection(nn.Module):
    """Names -> the channels that their regions have beside the latent."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, channels)

    def forward(self, encoder: TextEncoder, ids: Tensor) -> Tensor:
        """ids (K, L) of names -> (K, channels): their text's last token, projected."""
        states = encoder(ids).tokens
        last = (ids == encoder.spec.eos_id).int().argmax(dim=1)
        return self.projection(states[torch.arange(len(ids), device=ids.device), last])


class TextConditioner(nn.Module):
    """Prompts -> context, and where the model knows regions, labels -> channels beside the latent.

    Every encoder reads the whole prompt, with its own tokenizer; their vectors of a token stand side by side.
    The null context is that of the empty prompt, or zeros; where there is no region, its channels are 0.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        layout: LayoutProjection | None = None,
        labels: Sequence[str] = (),
        zero_null: bool = False,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.layout = layout
        self.labels = tuple(labels)
        self.zero_null = zero_null

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def contexts(self, asked: Asked) -> Context:
        """Without guidance's condition and with it: tokens (2, L, C), pooled (2, P) where there is such.

        L is that of a chunk times self.chunks(asked). pooled is that of the first chunk, without weights.
        """
        count, readers = self.chunks(asked), [encoder.reader for encoder in self.encoders]
        ids, weights = zip(
            *(reader.table(asked.prompts, asked.reading, count) for reader in readers), strict=True
        )
        tokens, pooled = self.encode(ids, weights)
        both = Context(side_by_side(tokens, count), None if pooled is None else pooled[::count])
        if not self.zero_null or asked.negative_prompt:
            return both
        return Context(*(None if told is None else without_first(told) for told in both))

    def chunks(self, asked: Asked) -> int:
        """Contexts that the longer prompt fills."""
        return longest(asked, [encoder.reader for encoder in self.encoders])

    def tokenize(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids (B, n) of each encoder, padded and cut to the context length."""
        return [encoder.tokenize(prompts) for encoder in self.encoders]

    def encode(self, ids: Sequence[Tensor], weights: Sequence[Tensor | None] | None = None) -> Context:
        """ids and weights (B, n) of each encoder -> tokens (B, L, C), pooled (B, P) where there is such."""
        told = [
            encoder(each.to(device=self.device, dtype=torch.long))
            for encoder, each in zip(self.encoders, ids, strict=True)
        ]
        pooled = [one.pooled for one in told if one.pooled is not None]
        weights = weights or [None] * len(told)
        tokens = torch.cat([weighed(one.tokens, w) for one, w in zip(told, weights, strict=True)], dim=-1)
        return Context(tokens, torch.cat(pooled, dim=-1) if pooled else None)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, C), cut to the context length."""
        return self.encode(self.tokenize(prompts)).tokens

    def from_ids(self, *ids: Tensor) -> Tensor:
        """Token ids (B, n) of each encoder, or of all -> (B, L, C): a vector a token, or one of the text."""
        return self.encode(ids * len(self.encoders) if len(ids) == 1 else ids).tokens

    def from_regions(self, regions: Tensor) -> Tensor:
        """regions (h, w), the number of a label counted from 1, or 0 for none -> (channels, h, w)."""
        encoder = self.encoders[0]
        present, index = regions.to(self.device).unique(return_inverse=True)
        ids = encoder.tokenize([self.labels[max(number - 1, 0)] for number in present.tolist()])
        table = self.layout(encoder, ids.to(self.device)) * (present > 0)[:, None]
        return table[index].movedim(-1, 0)

    def overflow(self, prompt: str, reading: Reading = Reading()) -> str:  # noqa: B008
        """The end of the prompt that is left out; '' if it fits."""
        return self.encoders[0].reader.overflow(prompt, reading)


def longest(asked: Asked, readers: Sequence[Reader]) -> int:
    """Chunks that the longer prompt takes with the tokenizer that makes the most of it."""
    return max(len(reader.chunks(prompt, asked.reading)) for reader in readers for prompt in asked.prompts)


def side_by_side(tokens: Tensor, count: int) -> Tensor:
    """(B n, L, C), the n chunks of each prompt in turn -> (B, n L, C)."""
    return tokens.unflatten(0, (-1, count)).flatten(1, 2)


def without_first(told: Tensor) -> Tensor:
    """(2, ...) with zeros for the first."""
    return torch.stack([torch.zeros_like(told[0]), told[1]])


class TokenConditioner(nn.Module):
    """Prompts in BERT's words -> context. The null context is that of the empty prompt."""

    def __init__(self, spec: TokenSpec, tokenizer: BertTokenizer | None = None) -> None:
        super().__init__()
        self.transformer = TokenTransformer(spec)
        self.tokenizer = tokenizer

    @property
    def reader(self) -> Reader:
        """Raises CheckpointError where there is no tokenizer: single files carry none."""
        if self.tokenizer is None:
            raise CheckpointError(WANTED)
        return Reader(self.tokenizer, self.transformer.spec.tokens)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Begin and end tokens added, padded and cut to the context length: (B, L) integers."""
        return self.reader.table(prompts, Reading())[0]

    def chunks(self, asked: Asked) -> int:
        """Contexts that the longer prompt fills."""
        return longest(asked, [self.reader])

    def contexts(self, asked: Asked) -> Context:
        """Without guidance's condition and with it: (2, L, C), L that of a chunk times self.chunks(asked)."""
        count = self.chunks(asked)
        ids, weights = self.reader.table(asked.prompts, asked.reading, count)
        return Context(side_by_side(weighed(self.from_ids(ids), weights), count))

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, C)."""
        return self.from_ids(self.tokenize(prompts))

    def from_ids(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, C)."""
        return self.transformer(ids.to(device=self.transformer.device, dtype=torch.long))

    def overflow(self, prompt: str, reading: Reading = Reading()) -> str:  # noqa: B008
        """The end of the prompt that is left out; '' if it fits."""
        return self.reader.overflow(prompt, reading)


class BoxConditioner(nn.Module):
    """Scenes of boxes -> context. There is no null context."""

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()
        self.transformer = TokenTransformer(spec)

    def contexts(self, asked: Asked) -> Context:
        """The same twice, for nothing guides: (2, L, C)."""
        return Context(self([asked.boxes]).expand(2, -1, -1))

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

    def contexts(self, asked: Asked) -> Context:
        """Without guidance's condition and with it: (2, 1, C); the same twice where nothing guides."""
        told = self.spec.null if asked.class_label is None else asked.class_label
        return Context(self([told if self.spec.null is None else self.spec.null, told]))

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

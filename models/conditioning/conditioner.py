"""Conditioners: prompts, classes, boxes and segmentation maps -> the UNet's context or concat channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, interpolate, pad
from transformers import PreTrainedTokenizerBase

from models.conditioning.boxes import Box, tokens
from models.conditioning.neighbours import with_neighbours
from models.conditioning.prompt_schedule import Composition
from models.conditioning.prompt_tokenizer import PromptTokenizer
from models.conditioning.prompts import PromptOptions
from models.conditioning.text_encoder import Context, TextEncoder, apply_weights
from models.errors import CheckpointError
from models.networks.modules import module_list
from models.networks.token_transformer import TokenTransformer
from models.spec import ClassSpec, Condition, SegmentationSpec, TokenSpec
from models.transfer import upload

PLAIN = PromptOptions()


class ConditioningInput(NamedTuple):
    """The conditioning inputs of one image. A conditioner ignores the fields of other conditioners."""

    prompt: str = ""
    negative_prompt: str = ""
    class_label: int | None = None  # None: no class
    boxes: Sequence[Box] = ()
    regions: Tensor | None = None  # (rows, columns), a segmentation map; labels count from 1, 0: no label
    size: tuple[int, int] | None = None  # (width, height) of the image; None: the model's default
    prompt_options: PromptOptions = PLAIN
    neighbours: Tensor | None = None  # (k, C), vectors of images, for a model that takes them
    composition: Composition | None = None  # of the two prompts, if they are made of several texts

    @property
    def prompts(self) -> tuple[str, ...]:
        """The text of each condition: the negative prompt and the prompt, or those of the composition."""
        return self.composition.texts if self.composition else (self.negative_prompt, self.prompt)

    @property
    def is_negative(self) -> tuple[bool, ...]:
        """Of each condition, whether it is a negative prompt."""
        return self.composition.is_negative if self.composition else (True, False)

    @property
    def empty_negatives(self) -> list[int]:
        """The conditions that are empty negative prompts."""
        texts = zip(self.prompts, self.is_negative, strict=True)
        return [index for index, (text, is_negative) in enumerate(texts) if is_negative and not text]


class LayoutProjection(nn.Module):
    """Label names -> one vector per label, which fills the label's regions in the concat channels."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, channels)

    def forward(self, encoder: TextEncoder, ids: Tensor) -> Tensor:
        """Token ids (K, L) of K names -> (K, channels): the projected vector of each end token."""
        states = encoder(ids).tokens
        end = (ids == encoder.spec.eos_id).int().argmax(dim=1)
        channels: Tensor = self.projection(states[torch.arange(len(ids), device=ids.device), end])
        return channels


class TextConditioner(nn.Module):
    """Prompts -> context by CLIP text encoders; labels -> concat channels where the model takes layouts.

    Every encoder reads the whole prompt with its own tokenizer; their token vectors are concatenated. The
    unconditional context is that of the negative prompt, or with zero_null zeros if that prompt is empty.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        layout: LayoutProjection | None = None,
        labels: Sequence[str] = (),
        zero_null: bool = False,
    ) -> None:
        super().__init__()
        self.encoders = module_list(encoders)
        self.layout = layout
        self.labels = tuple(labels)
        self.zero_null = zero_null

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def prompt_tokenizers(self) -> list[PromptTokenizer]:
        """The prompt tokenizer of each encoder."""
        return [encoder.prompt_tokenizer for encoder in self.encoders]

    def context_pair(self, inputs: ConditioningInput) -> Context:
        """The context of each of N conditions: the unconditional and the conditional one, or a composition's.

        tokens (N, L, C), L the length of a chunk times self.chunk_count(inputs), plus the neighbours; pooled
        (N, P) if the model has it, of the first chunk and without prompt weights.
        """
        count = self.chunk_count(inputs)
        ids, weights = zip(
            *(each.table(inputs.prompts, inputs.prompt_options, count) for each in self.prompt_tokenizers),
            strict=True,
        )
        states, pooled = self.encode(ids, weights, inputs.prompt_options.clip_skip)
        tokens, pooled = join_chunks(states, count), None if pooled is None else pooled[::count]
        if self.zero_null and (zeros := inputs.empty_negatives):
            tokens = with_zeros(tokens, zeros)
            pooled = None if pooled is None else with_zeros(pooled, zeros)
        context = Context(tokens, pooled)
        if inputs.neighbours is None:
            return context
        return with_neighbours(context, inputs.neighbours, inputs.is_negative)

    def chunk_count(self, inputs: ConditioningInput) -> int:
        """How many chunks the longest of the prompts fills."""
        return max_chunk_count(inputs, self.prompt_tokenizers)

    def tokenize(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token ids (B, n) for each encoder, padded and truncated to the context length."""
        return [encoder.tokenize(prompts) for encoder in self.encoders]

    def encode(
        self, ids: Sequence[Tensor], weights: Sequence[Tensor | None] | None = None, clip_skip: int = 1
    ) -> Context:
        """ids and weights, (B, n) per encoder -> tokens (B, n, C), pooled (B, P) if the model has it."""
        contexts: list[Context] = [
            encoder(upload(each, self.device, torch.long), clip_skip)
            for encoder, each in zip(self.encoders, ids, strict=True)
        ]
        pooled = [each.pooled for each in contexts if each.pooled is not None]
        weights = weights or [None] * len(contexts)
        states = [apply_weights(each.tokens, w) for each, w in zip(contexts, weights, strict=True)]
        return Context(torch.cat(states, dim=-1), torch.cat(pooled, dim=-1) if pooled else None)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts, truncated to the context length -> token vectors (B, L, C)."""
        return self.encode(self.tokenize(prompts)).tokens

    def from_ids(self, *ids: Tensor) -> Tensor:
        """Token ids (B, n), one tensor per encoder or one for all -> token vectors (B, n, C)."""
        return self.encode(ids * len(self.encoders) if len(ids) == 1 else ids).tokens

    def from_regions(self, regions: Tensor) -> Tensor:
        """Segmentation map (h, w), labels from 1, 0: no label -> concat channels (channels, h, w).

        Raises ValueError for a model without layout channels.
        """
        if self.layout is None:
            raise ValueError("this model takes no layout")
        encoder = self.encoders[0]
        present, index = regions.cpu().unique(return_inverse=True)
        ids = encoder.tokenize([self.labels[max(number - 1, 0)] for number in present.tolist()])
        vectors: Tensor = self.layout(encoder, upload(ids, self.device))  # (K, channels)
        table = vectors * upload(present > 0, self.device)[:, None]
        return table[upload(index, self.device)].movedim(-1, 0)

    def overflow(self, prompt: str, options: PromptOptions = PLAIN) -> str:
        """The end of the prompt that is truncated; '' if it fits."""
        return self.encoders[0].prompt_tokenizer.overflow(prompt, options)


def max_chunk_count(inputs: ConditioningInput, tokenizers: Sequence[PromptTokenizer]) -> int:
    """How many chunks the longest of the prompts fills, with the tokenizer that needs the most."""
    options = inputs.prompt_options
    return max(len(each.chunks(prompt, options)) for each in tokenizers for prompt in inputs.prompts)


def join_chunks(states: Tensor, count: int) -> Tensor:
    """Concatenates the n chunks of each prompt: (B n, L, C) -> (B, n L, C)."""
    joined: Tensor = states.unflatten(0, (-1, count)).flatten(1, 2)
    return joined


def with_zeros(states: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of states (N, ...) with zeros in some rows."""
    states = states.clone()
    states[rows] = 0
    return states


class TokenConditioner(nn.Module):
    """Prompts -> context, by BERT's tokenizer and a token transformer.

    The unconditional context is that of the negative prompt.
    """

    def __init__(self, spec: TokenSpec, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """tokenizer: single files do not hold it, so it may be set later, before the first prompt."""
        super().__init__()
        self.transformer = TokenTransformer(spec)
        self.tokenizer = tokenizer

    @property
    def prompt_tokenizer(self) -> PromptTokenizer:
        """The tokenizer of prompts. Raises CheckpointError if none was set."""
        if self.tokenizer is None:
            raise CheckpointError("prompts need vocab.txt of bert-base-uncased beside the checkpoint")
        return PromptTokenizer(self.tokenizer, self.transformer.spec.tokens)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L) with begin and end tokens, padded and truncated to the context length."""
        return self.prompt_tokenizer.table(prompts, PLAIN)[0]

    def chunk_count(self, inputs: ConditioningInput) -> int:
        """How many chunks the longest of the prompts fills."""
        return max_chunk_count(inputs, [self.prompt_tokenizer])

    def context_pair(self, inputs: ConditioningInput) -> Context:
        """The context of each condition as in TextConditioner, (N, L, C), L over all chunks."""
        count = self.chunk_count(inputs)
        ids, weights = self.prompt_tokenizer.table(inputs.prompts, inputs.prompt_options, count)
        return Context(join_chunks(apply_weights(self.from_ids(ids), weights), count))

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, C)."""
        return self.from_ids(self.tokenize(prompts))

    def from_ids(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, C)."""
        states: Tensor = self.transformer(upload(ids, self.transformer.device, torch.long))
        return states

    def overflow(self, prompt: str, options: PromptOptions = PLAIN) -> str:
        """The end of the prompt that is truncated; '' if it fits."""
        return self.prompt_tokenizer.overflow(prompt, options)


class BoxConditioner(nn.Module):
    """Boxes -> context. Without an unconditional context, guidance is not supported."""

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()
        self.transformer = TokenTransformer(spec)

    def context_pair(self, inputs: ConditioningInput) -> Context:
        """The conditional context in both rows: (2, L, C)."""
        return Context(self.forward([inputs.boxes]).expand(2, -1, -1))

    def forward(self, layouts: Sequence[Sequence[Box]]) -> Tensor:
        """The boxes of B images -> (B, L, C)."""
        return self.from_ids(torch.tensor([tokens(boxes, self.transformer.spec) for boxes in layouts]))

    def from_ids(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, C)."""
        states: Tensor = self.transformer(upload(ids, self.transformer.device, torch.long))
        return states


class ClassConditioner(nn.Module):
    """Class indices -> a context of one vector. The null class, if any, gives the unconditional context."""

    def __init__(self, spec: ClassSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.classes, spec.width)

    def context_pair(self, inputs: ConditioningInput) -> Context:
        """The unconditional and the conditional context, (2, 1, C); the same without a null class.

        Raises ValueError for an input without a class if the model has no null class.
        """
        null = self.spec.null
        label = null if inputs.class_label is None else inputs.class_label
        if label is None:
            raise ValueError("class_label is required: this model has no null class")
        return Context(self.forward([label if null is None else null, label]))

    def forward(self, labels: Sequence[int] | Tensor) -> Tensor:
        """B class indices -> (B, 1, C)."""
        device = self.embedding.weight.device
        vectors: Tensor = self.embedding(upload(torch.as_tensor(labels, dtype=torch.long), device))
        return vectors[:, None]


class SegmentationConditioner(nn.Module):
    """Segmentation maps -> concat channels: a learned vector per class, resized to the latent's size."""

    def __init__(self, spec: SegmentationSpec) -> None:
        super().__init__()
        self.spec = spec
        self.channel_mapper = nn.Conv2d(spec.classes, spec.channels, 1, bias=False)

    def context_pair(self, inputs: ConditioningInput) -> None:
        """None: this conditioner makes concat channels and no context."""

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of classes counted from 0, (B, H, W) -> (B, C, H / 2^n, W / 2^n), n spec.halvings."""
        return self.channels_of(maps + 1)

    def from_regions(self, regions: Tensor) -> Tensor:
        """A map of labels counted from 1, 0: no label, (H, W) -> (C, H / 2^n, W / 2^n)."""
        return self.channels_of(regions[None])[0]

    def channels_of(self, maps: Tensor) -> Tensor:
        """As from_regions(), for a batch (B, H, W).

        The reference halves one-hot maps, then mixes their channels. Both operations are linear, so the order
        does not matter: looking up the mixed vectors first needs far less memory.
        """
        weight = self.channel_mapper.weight
        vectors = pad(weight.flatten(1).T, (0, 0, 1, 0))  # (1 + classes, C); row 0, no label, is zeros
        y = embedding(upload(maps, weight.device, torch.long), vectors).movedim(-1, 1)
        for _ in range(self.spec.halvings):
            y = interpolate(y, scale_factor=0.5, mode="bilinear")
        return y


Conditioner = TextConditioner | TokenConditioner | BoxConditioner | ClassConditioner | SegmentationConditioner


def make_conditioner(condition: Condition | None) -> Conditioner | None:
    """The conditioner of a condition; None for no condition."""
    if isinstance(condition, TokenSpec):
        return BoxConditioner(condition) if condition.objects else TokenConditioner(condition)
    if isinstance(condition, ClassSpec):
        return ClassConditioner(condition)
    return None if condition is None else SegmentationConditioner(condition)

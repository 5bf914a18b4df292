"""Prompts -> chunks of token ids, by CLIP's or BERT's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.conditioning.prompts import (
    PromptOptions,
    SpecialTokens,
    Token,
    chunks_of,
    pieces_of,
    tokens_of,
    truncated_text,
)


@dataclass(frozen=True)
class PromptTokenizer:
    """Tokenizes prompts into chunks, each as long as the context of one text encoder.

    length: of a chunk, begin and end tokens included. learned_words: as in prompts.tokens_of().
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    learned_words: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def special(self) -> SpecialTokens:
        """CLIP's begin and end tokens, or BERT's."""
        t = self.tokenizer
        begin, end = (
            (t.bos_token_id, t.eos_token_id) if t.cls_token is None else (t.cls_token_id, t.sep_token_id)
        )
        return SpecialTokens(begin, end, t.pad_token_id, self.length)

    def split(self, text: str) -> list[tuple[int, int]]:
        """Id and first character of each token."""
        # verbose=False: no warning about long texts, which are split or truncated here.
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            (each, begin)
            for each, (begin, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def chunks(self, prompt: str, options: PromptOptions) -> list[Sequence[Token]]:
        """The chunks of a prompt, at least one."""
        tokens = tokens_of(pieces_of(prompt, options), self.split, self.learned_words)
        comma = self.split(",")[-1][0] if options.breaks else -1
        return chunks_of(tokens, self.special.room, options, comma)

    def table(
        self, prompts: Sequence[str], options: PromptOptions, count: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """Ids (B n, L) of the n = count chunks of each prompt, and their weights (B n, L); None if all are 1.

        A prompt that fills fewer chunks gets chunks of an empty prompt for the rest.
        """
        special = self.special
        chunks: list[Sequence[Token]] = []
        for prompt in prompts:
            filled = self.chunks(prompt, options)
            chunks += [*filled, *[()] * (count - len(filled))]
        ids = torch.tensor([special.ids(chunk) for chunk in chunks], dtype=torch.long)
        weights = torch.tensor([special.weights(chunk) for chunk in chunks])
        return ids, None if (weights == 1).all() else weights

    def overflow(self, prompt: str, options: PromptOptions) -> str:
        """The end of the prompt that is truncated; '' if it fits."""
        pieces = pieces_of(prompt, options)
        tokens = tokens_of(pieces, self.split, self.learned_words)
        kept = sum(map(len, self.chunks(prompt, options)))
        return truncated_text(pieces, tokens, kept)

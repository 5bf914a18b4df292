"""CLIP text encoders: prompts -> token vectors, a projected vector of the whole text, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from models.conditioning.prompt_tokenizer import PromptTokenizer
from models.conditioning.prompts import PromptOptions
from models.errors import CheckpointError
from models.networks.clip import TextTransformer
from models.spec import TextSpec
from models.transfer import upload


class Context(NamedTuple):
    """A conditioner's output: vectors that the UNet attends to, and a pooled vector."""

    tokens: Tensor  # (B, L, C), for cross-attention
    pooled: Tensor | None = None  # (B, P), added to the timestep embedding

    def rows(self, part: slice) -> Context:
        """Some of the B rows."""
        return Context(self.tokens[part], None if self.pooled is None else self.pooled[part])


def apply_weights(states: Tensor, weights: Tensor | None) -> Tensor:
    """Token vectors (B, L, C) times their weights (B, L), rescaled so that each prompt's mean stays."""
    if weights is None:
        return states
    before, after = states.float(), states.float() * upload(weights, states.device)[..., None]
    mean = after.mean(dim=(1, 2), keepdim=True)
    rescaling = torch.where(mean == 0, 1.0, before.mean(dim=(1, 2), keepdim=True) / mean)
    return (after * rescaling).to(states.dtype)


class TextEncoder(nn.Module):
    """CLIP's text transformer with its tokenizer."""

    def __init__(self, spec: TextSpec, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """tokenizer: None if it is set later, before the first prompt."""
        super().__init__()
        self.spec = spec
        self.tokenizer = tokenizer
        self.learned_words: dict[str, tuple[int, ...]] = {}  # of textual inversion, in lower case -> ids
        self.transformer = TextTransformer(spec)
        if width := spec.projection or spec.pooled:
            self.text_projection = nn.Linear(spec.width, width, bias=False)

    @property
    def prompt_tokenizer(self) -> PromptTokenizer:
        """The tokenizer of prompts. Raises CheckpointError if none was set."""
        if self.tokenizer is None:
            raise CheckpointError("this text encoder has no tokenizer")
        return PromptTokenizer(self.tokenizer, self.spec.tokens, self.learned_words)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L), padded and truncated to the context length."""
        return self.prompt_tokenizer.table(prompts, PromptOptions())[0]

    def forward(self, ids: Tensor, clip_skip: int = 1) -> Context:
        """Token ids (B, n) -> tokens (B, n, C), from the layer and with the norm that the spec names.

        clip_skip: the tokens come from clip_skip - 1 layers before that layer.

        With spec.projection, tokens are one projected vector per text, normalised to length 1: (B, 1, C)
        (Radford et al. 2021, figure 3). With spec.pooled, pooled (B, P) is the projected vector of the text,
        not normalised.
        """
        spec, norm, states = self.spec, self.transformer.final_layer_norm, self.transformer(ids)
        if spec.projection:
            return Context(normalize(self.project_text(ids, norm(states[-1])), dim=-1)[:, None])
        tokens = states[-spec.skipped - clip_skip]
        pooled = self.project_text(ids, norm(states[-1])) if spec.pooled else None
        return Context(norm(tokens) if spec.final_norm else tokens, pooled)

    def project_text(self, ids: Tensor, states: Tensor) -> Tensor:
        """The projected vector of the end token: ids (B, n), states (B, n, C) after the norm -> (B, P)."""
        end = (ids == self.spec.eos_id).int().argmax(dim=1)  # the first: CLIP pads with the same token
        projected: Tensor = self.text_projection(states[torch.arange(len(ids), device=ids.device), end])
        return projected

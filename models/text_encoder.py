"""CLIP's text transformer and tokenizer, through `transformers`, behind two small calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.spec import TextSpec


def text_config(spec: TextSpec) -> CLIPTextConfig:
    """The `transformers` configuration of a text transformer of this shape."""
    return CLIPTextConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        intermediate_size=spec.intermediate,
        max_position_embeddings=spec.tokens,
        hidden_act=spec.activation,
        bos_token_id=spec.bos_id,
        eos_token_id=spec.eos_id,
        pad_token_id=spec.pad_id,
        projection_dim=spec.width,
    )


class TextEncoder(nn.Module):
    """Prompts -> token ids -> one vector a token."""

    def __init__(self, spec: TextSpec, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.spec = spec
        self.tokenizer = tokenizer
        self.transformer = CLIPTextModel(text_config(spec))

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Padded and cut to the context length: (B, L) integers."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.spec.tokens, truncation=True
        )["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, C), after the final LayerNorm."""
        return self.transformer(input_ids=ids).last_hidden_state

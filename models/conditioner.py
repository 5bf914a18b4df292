"""What a request says, as a context for the UNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.text_encoder import TextEncoder


class TextConditioner(nn.Module):
    """Prompts -> context. The null context is that of the empty prompt."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, C), cut to the context length."""
        return self.from_ids(self.encoder.tokenize(prompts))

    def from_ids(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, C)."""
        device = next(self.encoder.parameters()).device
        return self.encoder(ids.to(device=device, dtype=torch.long))

    def overflow(self, prompt: str) -> str:
        """The end of the prompt that the context length leaves out; '' if it fits."""
        # The tokenizer calls a long text a mistake where it is not cut; here that is what is asked.
        encoded = self.encoder.tokenizer(
            prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets, kept = encoded["offset_mapping"], self.encoder.spec.tokens - 2  # begin and end take two
        return prompt[offsets[kept][0] :].strip() if len(offsets) > kept else ""

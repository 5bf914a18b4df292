"""What a request says, as a context for the UNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.text_encoder import TextEncoder

GRAY = 128  # what a pixel under the mask is shown as to a UNet with mask channels


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

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, C), cut to the context length."""
        return self.from_ids(self.encoder.tokenize(prompts))

    def from_ids(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, C)."""
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
        # The tokenizer calls a long text a mistake where it is not cut; here that is what is asked.
        encoded = self.encoder.tokenizer(
            prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets, kept = encoded["offset_mapping"], self.encoder.spec.tokens - 2  # begin and end take two
        return prompt[offsets[kept][0] :].strip() if len(offsets) > kept else ""

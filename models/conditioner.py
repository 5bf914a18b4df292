"""What a request says, as a context for the UNet or as channels beside the latent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, interpolate
from transformers import BertTokenizer

from models.configs import CheckpointError
from models.spec import ClassSpec, Condition, SegmentationSpec, TokenSpec
from models.text_encoder import TextEncoder, TokenTransformer

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


class TokenConditioner(nn.Module):
    """Prompts in BERT's words, or token ids of any kind such as boxes' -> context.

    The null context of a text model is that of the empty prompt.
    """

    def __init__(self, spec: TokenSpec, tokenizer: BertTokenizer | None = None) -> None:
        super().__init__()
        self.transformer = TokenTransformer(spec)
        self.tokenizer = tokenizer

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Begin and end tokens added, padded and cut to the context length: (B, L) integers.

        Raises CheckpointError where there is no tokenizer: single files carry none.
        """
        if self.tokenizer is None:
            raise CheckpointError("prompts need vocab.txt of bert-base-uncased beside the checkpoint")
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.transformer.spec.tokens, truncation=True
        )["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (B, L, C)."""
        return self.from_ids(self.tokenize(prompts))

    def from_ids(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, C)."""
        device = self.transformer.token_emb.weight.device
        return self.transformer(ids.to(device=device, dtype=torch.long))


class ClassConditioner(nn.Module):
    """Numbers of classes -> a context of one vector."""

    def __init__(self, spec: ClassSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.classes, spec.width)

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

    def forward(self, maps: Tensor) -> Tensor:
        """Numbers of classes from 0, (B, H, W) -> (B, C, H / 2^n, W / 2^n).

        The reference halves a channel a class and mixes them then; both are linear, so to look the colour up
        first is the same with far less memory.
        """
        weight = self.channel_mapper.weight
        colours = weight.flatten(1).T  # (classes, C)
        y = embedding(maps.to(device=weight.device, dtype=torch.long), colours).movedim(-1, 1)
        for _ in range(self.spec.halvings):
            y = interpolate(y, scale_factor=0.5, mode="bilinear")
        return y


Conditioner = TextConditioner | TokenConditioner | ClassConditioner | SegmentationConditioner


def make_conditioner(condition: Condition | None) -> Conditioner | None:
    """What a condition goes through; None where it has no weights of its own."""
    if isinstance(condition, TokenSpec):
        return TokenConditioner(condition)
    if isinstance(condition, ClassSpec):
        return ClassConditioner(condition)
    return None if condition is None else SegmentationConditioner(condition)

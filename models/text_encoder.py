"""Text encoders: CLIP's with its tokenizer, and the paper's own transformer over tokens.

Module names of the latter equal the keys of the published CompVis checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from models.clip import TextTransformer
from models.spec import TextSpec, TokenSpec


def overflow(tokenizer: PreTrainedTokenizerBase, tokens: int, prompt: str) -> str:
    """The end of the prompt that a context length of so many tokens leaves out; '' if it fits."""
    # The tokenizer calls a long text a mistake where it is not cut; here that is what is asked.
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets, kept = encoded["offset_mapping"], tokens - 2  # begin and end take two
    return prompt[offsets[kept][0] :].strip() if len(offsets) > kept else ""


class TextEncoder(nn.Module):
    """Prompts -> token ids -> one vector a token, or one of the whole text."""

    def __init__(self, spec: TextSpec, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.spec = spec
        self.tokenizer = tokenizer
        self.transformer = TextTransformer(spec)
        if spec.projection:
            self.text_projection = nn.Linear(spec.width, spec.projection, bias=False)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Padded and cut to the context length: (B, L) integers."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.spec.tokens, truncation=True
        )["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, n) -> (B, n, C), after the final LayerNorm; with a projection (B, 1, C), the end token's,
        projected and of length 1 (Radford et al. 2021, figure 3)."""
        states = self.transformer.final_layer_norm(self.transformer(ids)[-1])
        if not self.spec.projection:
            return states
        end = (ids == self.spec.eos_id).int().argmax(dim=1)  # the first: CLIP pads with the same token
        text = self.text_projection(states[torch.arange(len(ids), device=ids.device), end])
        return normalize(text, dim=-1)[:, None]


class TokenAttention(nn.Module):
    """Self-attention whose heads have a width of their own, not a share of the input's."""

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()
        self.heads, inner = spec.heads, spec.heads * spec.head_width
        self.to_q = nn.Linear(spec.width, inner, bias=False)
        self.to_k = nn.Linear(spec.width, inner, bias=False)
        self.to_v = nn.Linear(spec.width, inner, bias=False)
        self.to_out = nn.Linear(inner, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> (B, L, C)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, head_width)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TokenFeedForward(nn.Module):
    """Four times as wide inside, exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        # The middle entry is the reference's dropout: it keeps the published key `net.2`.
        self.net = nn.Sequential(inner, nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TokenLayers(nn.Module):
    """Attention and feed-forward in turn, each a layer of its own behind a LayerNorm and a residual."""

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(spec.layers):
            for layer in (TokenAttention(spec), TokenFeedForward(spec.width)):
                self.layers.append(nn.ModuleList([nn.LayerNorm(spec.width), layer]))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in self.layers:
            x = x + layer(norm(x))
        return x


class TokenPositions(nn.Module):
    """One learned vector a position."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(tokens, width)

    def forward(self, length: int) -> Tensor:
        """(length, C), of the first positions."""
        return self.emb.weight[:length]


class TokenTransformer(nn.Module):
    """Token ids -> one vector a token. Padding is attended to like anything else, as in training."""

    def __init__(self, spec: TokenSpec) -> None:
        super().__init__()
        self.spec = spec
        self.token_emb = nn.Embedding(spec.vocabulary, spec.width)
        self.pos_emb = TokenPositions(spec.tokens, spec.width)
        self.attn_layers = TokenLayers(spec)
        self.norm = nn.LayerNorm(spec.width)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, C), after the final LayerNorm."""
        return self.norm(self.attn_layers(self.token_emb(ids) + self.pos_emb(ids.shape[1])))

"""Text encoders: CLIP's with its tokenizer, and the paper's own transformer over tokens.

Module names of the latter equal the keys of the published CompVis checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from models.conditioning.prompts import Frame, Reading, Token, chunks_of, left_out, pieces_of, tokens_of
from models.networks.clip import TextTransformer
from models.spec import TextSpec, TokenSpec


class Context(NamedTuple):
    """What the UNet is told by a conditioner."""

    tokens: Tensor  # (B, L, C): what it attends to
    pooled: Tensor | None = None  # (B, P): what it is told beside the timestep

    def rows(self, part: slice) -> Context:
        return Context(self.tokens[part], None if self.pooled is None else self.pooled[part])


@dataclass(frozen=True)
class Reader:
    """Prompts -> chunks of token ids, each as long as the context. words: as in prompts.tokens_of."""

    tokenizer: PreTrainedTokenizerBase
    length: int
    words: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def frame(self) -> Frame:
        """Begin and end are CLIP's, or BERT's."""
        t = self.tokenizer
        begin, end = (
            (t.bos_token_id, t.eos_token_id) if t.cls_token is None else (t.cls_token_id, t.sep_token_id)
        )
        return Frame(begin, end, t.pad_token_id, self.length)

    def split(self, text: str) -> list[tuple[int, int]]:
        """Id and first character of each token."""
        # The tokenizer calls a long text a mistake where it is not cut; here that is what is asked.
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            (each, begin) for each, (begin, _) in zip(read["input_ids"], read["offset_mapping"], strict=True)
        ]

    def chunks(self, prompt: str, reading: Reading) -> list[Sequence[Token]]:
        """At least one."""
        tokens = tokens_of(pieces_of(prompt, reading), self.split, self.words)
        return chunks_of(tokens, self.frame.room, reading)

    def table(self, prompts: Sequence[str], reading: Reading, count: int = 1) -> tuple[Tensor, Tensor | None]:
        """ids (B n, L), the n chunks of each prompt in turn; weights (B n, L), None where all are 1.

        Who has fewer chunks than `count` has empty ones then, as an empty prompt has.
        """
        frame, chunks = self.frame, []
        for prompt in prompts:
            read = self.chunks(prompt, reading)
            chunks += [*read, *[()] * (count - len(read))]
        ids = torch.tensor([frame.ids(chunk) for chunk in chunks], dtype=torch.long)
        weights = torch.tensor([frame.weights(chunk) for chunk in chunks])
        return ids, None if (weights == 1).all() else weights

    def overflow(self, prompt: str, reading: Reading) -> str:
        """The end of the prompt that is left out; '' if it fits."""
        pieces = pieces_of(prompt, reading)
        return left_out(pieces, tokens_of(pieces, self.split, self.words), self.frame.room, reading)


def weighed(states: Tensor, weights: Tensor | None) -> Tensor:
    """Vectors of tokens (B, L, C) times their weights (B, L), with the mean that they had before."""
    if weights is None:
        return states
    before, after = states.float(), states.float() * weights.to(states.device)[..., None]
    mean = after.mean(dim=(1, 2), keepdim=True)
    back = torch.where(mean == 0, 1.0, before.mean(dim=(1, 2), keepdim=True) / mean)
    return (after * back).to(states.dtype)


class TextEncoder(nn.Module):
    """Prompts -> token ids -> one vector a token, one of the whole text, or both."""

    def __init__(self, spec: TextSpec, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.spec = spec
        self.tokenizer = tokenizer
        self.words: dict[str, tuple[int, ...]] = {}  # learned later: what each becomes
        self.transformer = TextTransformer(spec)
        if width := spec.projection or spec.pooled:
            self.text_projection = nn.Linear(spec.width, width, bias=False)

    @property
    def reader(self) -> Reader:
        return Reader(self.tokenizer, self.spec.tokens, self.words)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Padded and cut to the context length: (B, L) integers."""
        return self.reader.table(prompts, Reading())[0]

    def forward(self, ids: Tensor) -> Context:
        """ids (B, n) -> tokens (B, n, C), of the layer and with the norm that the spec says.

        With a projection the tokens are one, (B, 1, C): the whole text's, of length 1 (Radford et al. 2021,
        figure 3). pooled (B, P): the whole text's where the spec has both, of any length.
        """
        spec, norm, states = self.spec, self.transformer.final_layer_norm, self.transformer(ids)
        if spec.projection:
            return Context(normalize(self.whole(ids, norm(states[-1])), dim=-1)[:, None])
        tokens = states[-1 - spec.skipped]
        pooled = self.whole(ids, norm(states[-1])) if spec.pooled else None
        return Context(norm(tokens) if spec.final_norm else tokens, pooled)

    def whole(self, ids: Tensor, states: Tensor) -> Tensor:
        """The end token's vector, projected: ids (B, n), states (B, n, C) after the norm -> (B, P)."""
        end = (ids == self.spec.eos_id).int().argmax(dim=1)  # the first: CLIP pads with the same token
        return self.text_projection(states[torch.arange(len(ids), device=ids.device), end])


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

"""A small CLIP-style byte-pair vocabulary for captions of drawn scenes.

CLIP's own 49,408 tokens would outweigh the rest of a small model; this one holds every word of the captions
as a token of its own and falls back to bytes for all else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from models.training.scenes import COLOURS, known_glyphs

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
Pair = tuple[str, str]


def caption_words() -> Counter[str]:
    """Words of every possible caption, with how many captions' parts hold them."""
    phrases = [*known_glyphs(), *COLOURS, "a", "an", "the", "on", "left of", "right of", "above", "below",
               "and", "with", "background", "small", "large", "upside down", "tilted", "two", "three", "four",
               "to", "striped", "dotted"]  # fmt: skip
    return Counter(word for phrase in phrases for word in phrase.replace("-", " ").split())


def learn_merges(words: Counter[str]) -> list[Pair]:
    """Byte-pair merges until every word is one token (Sennrich et al. 2016, algorithm 1)."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[Pair] = []
    while True:
        pairs: Counter[Pair] = Counter()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, symbols in split.items():
            split[word] = merge(symbols, best)


def merge(symbols: list[str], pair: Pair) -> list[str]:
    """Join each neighbouring occurrence of a pair."""
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def build_tokenizer(tokens: int, words: Iterable[str] | None = None) -> CLIPTokenizer:
    """A CLIP tokenizer over the captions' words; `tokens` is the context length."""
    merges = learn_merges(caption_words() if words is None else Counter(words))
    alphabet = sorted(ByteLevel.alphabet())
    entries = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), BEGIN, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokens)

"""A small CLIP-style byte-pair vocabulary for captions of drawn scenes.

CLIP's own 49,408 token embeddings would be larger than the rest of a small model. This vocabulary has a token
for every word of the captions and falls back to bytes for everything else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from models.training.scenes import COLOURS, known_glyphs

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
Pair = tuple[str, str]
PHRASES = (  # of captions, besides names and colours
    *("a", "an", "the", "on", "left of", "right of", "above", "below", "and", "with", "background"),
    *("small", "large", "upside down", "tilted", "two", "three", "four", "to", "striped", "dotted"),
)


def caption_words() -> Counter[str]:
    """The words of all captions, each with the number of phrases that contain it."""
    phrases = [*known_glyphs(), *COLOURS, *PHRASES]
    return Counter(word for phrase in phrases for word in phrase.replace("-", " ").split())


def learn_merges(words: Counter[str]) -> list[Pair]:
    """Byte-pair merges until every word is one token (Sennrich et al. 2016, algorithm 1)."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    counts: Counter[Pair] = Counter()
    containing: defaultdict[Pair, set[str]] = defaultdict(
        set
    )  # words that contain each pair, or did before a merge

    def count(word: str, sign: int) -> None:
        for pair in pairwise(split[word]):
            counts[pair] += sign * words[word]
            containing[pair].add(word)
            if not counts[pair]:
                del counts[pair]

    for word in words:
        count(word, 1)
    merges: list[Pair] = []
    while counts:
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in list(containing[best]):
            count(word, -1)
            split[word] = merge(split[word], best)
            count(word, 1)
        del containing[best]
    return merges


@cache
def caption_merges() -> list[Pair]:
    """The merges of all captions' words; computed once, in seconds."""
    return learn_merges(caption_words())


def merge(symbols: list[str], pair: Pair) -> list[str]:
    """Joins every occurrence of a pair of neighbouring symbols."""
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def build_tokenizer(tokens: int, words: Iterable[str] | None = None) -> CLIPTokenizer:
    """A CLIP tokenizer over the given words.

    tokens: the context length; words: None: the captions' words.
    """
    merges = caption_merges() if words is None else learn_merges(Counter(words))
    alphabet = sorted(ByteLevel.alphabet())
    entries = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), BEGIN, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(entries))}
    # transformers annotates merges as strings, but takes pairs.
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=tokens)  # type: ignore[arg-type]

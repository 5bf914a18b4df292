"""The tokenizers that come with the package: CLIP's. Nothing is fetched."""

from __future__ import annotations

import gzip
from importlib import resources

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 77  # context length of every published CLIP text encoder


def clip(pad: int | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer of 49,408 tokens (Radford et al. 2021), as folders of Stable Diffusion have it.

    pad: the id that fills up short prompts; the end token's if missing. Stable Diffusion 2 and SDXL's second
    encoder were trained with 0, which is "!": as in their published folders, each "!" of a prompt is then
    that token too, and no longer part of a longer one. Raises ValueError for an id that is no token's.
    """
    merges = read_merges()
    entries = [*alphabet(), *(character + "</w>" for character in alphabet())]
    entries += ["".join(pair) for pair in merges] + [BEGIN, END]
    if pad is not None and not 0 <= pad < len(entries):
        raise ValueError(f"pad must be 0 to {len(entries) - 1}, not {pad}")
    vocabulary = {token: index for index, token in enumerate(entries)}
    token = END if pad is None else entries[pad]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=token, model_max_length=TOKENS)


def read_merges() -> list[tuple[str, str]]:
    """Pairs of byte sequences that become one, in the order in which they are tried."""
    packed = resources.files("weights").joinpath("tokenizers", "clip", "merges.txt.gz").read_bytes()
    pairs = (line.split(" ") for line in gzip.decompress(packed).decode().splitlines())
    return [(first, second) for first, second in pairs]


def alphabet() -> list[str]:
    """The characters that stand for the 256 bytes, in the order of their ids.

    Printable bytes stand for themselves and come first; the others have characters from U+0100 on.
    """
    return sorted(ByteLevel.alphabet())

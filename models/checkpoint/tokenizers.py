"""Tokenizers: CLIP's, which comes with this package, and those in the files next to a model. No downloads."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, CLIPTokenizer

from models.checkpoint.parts import OpenedModel
from models.conditioning.conditioner import TextConditioner, TokenConditioner
from models.errors import CheckpointError
from models.formats.companions import find_vocabulary
from models.formats.config_files import reason
from models.formats.diffusers_tables import TOKENIZERS
from models.spec import TextSpec, TokenSpec

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77  # tokens, of every published CLIP text encoder
CLIP_FILES = ("vocab.json", "tokenizer.json")  # a folder of CLIP's tokenizer has one of these


def give_tokenizers(opened: OpenedModel, vocabulary: Path | None) -> None:
    """Set the tokenizers of a text conditioner, which no file of weights contains."""
    source, conditioner = opened.source, opened.networks.conditioner
    if isinstance(conditioner, TextConditioner):
        for encoder, number in zip(conditioner.encoders, opened.spec.encoder_numbers, strict=True):
            text = encoder.spec
            if source.text_encoders:
                encoder.tokenizer = clip(None if text.pad_id == text.eos_id else text.pad_id)
            else:
                encoder.tokenizer = read_clip_tokenizer(source.folder / TOKENIZERS[number], text)
    elif isinstance(conditioner, TokenConditioner):
        file = find_vocabulary(source.folder, vocabulary)
        if file and isinstance(opened.spec.condition, TokenSpec):
            conditioner.tokenizer = read_bert_tokenizer(file, opened.spec.condition)


def has_clip_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CLIP_FILES)


def read_clip_tokenizer(folder: Path, spec: TextSpec) -> CLIPTokenizer:
    """The tokenizer in a folder. Raises CheckpointError if the text encoder has too few embeddings for it."""
    if not has_clip_tokenizer(folder):
        raise CheckpointError(f"{folder / CLIP_FILES[0]} is missing")
    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever the bytes lead to
        raise CheckpointError(f"{folder} cannot be read as a CLIP tokenizer: {reason(error)}") from error
    check_size(folder, len(tokenizer), spec.vocabulary)
    return tokenizer


def read_bert_tokenizer(file: Path, spec: TokenSpec) -> BertTokenizer:
    """The tokenizer of a vocabulary. Raises CheckpointError if the text encoder has too few embeddings."""
    try:
        tokenizer: BertTokenizer = BertTokenizer.from_pretrained(file.parent, local_files_only=True)
    except Exception as error:  # transformers raises whatever the bytes lead to
        raise CheckpointError(f"{file} cannot be read as BERT's vocabulary: {reason(error)}") from error
    check_size(file, len(tokenizer), spec.vocabulary)
    return tokenizer


def check_size(path: Path, tokens: int, vocabulary: int) -> None:
    if tokens > vocabulary:
        raise CheckpointError(f"{path} has {tokens} tokens, the text encoder {vocabulary}")


def clip(pad: int | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer of 49,408 tokens (Radford et al. 2021), as Stable Diffusion's folders have it.

    pad: id of the token that fills up short prompts; the end token's if None. Stable Diffusion 2 and SDXL's
    second encoder were trained with 0, which is "!": as in their published folders, each "!" of a prompt is
    then that token too, and no longer part of a longer one. Raises ValueError for an unknown id.
    """
    merges = read_merges()
    entries = [*byte_alphabet(), *(character + "</w>" for character in byte_alphabet())]
    entries += ["".join(pair) for pair in merges] + [BEGIN, END]
    if pad is not None and not 0 <= pad < len(entries):
        raise ValueError(f"pad must be 0 to {len(entries) - 1}, not {pad}")
    vocabulary = {token: index for index, token in enumerate(entries)}
    token = END if pad is None else entries[pad]
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]  # annotated as strings, but pairs are what it takes
        pad_token=token,
        model_max_length=CONTEXT_LENGTH,
    )


def read_merges() -> list[tuple[str, str]]:
    """Pairs of byte sequences that are merged into one, in the order in which they are tried."""
    packed = resources.files("weights").joinpath("tokenizers", "clip", "merges.txt.gz").read_bytes()
    pairs = (line.split(" ") for line in gzip.decompress(packed).decode().splitlines())
    return [(first, second) for first, second in pairs]


def byte_alphabet() -> list[str]:
    """The characters that represent the 256 bytes, in the order of their ids.

    Printable bytes represent themselves and come first; the others have characters from U+0100 on.
    """
    return sorted(ByteLevel.alphabet())

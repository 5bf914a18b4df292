"""Files that some models need next to their single file: BERT's vocabulary, CLIP's text encoder, a VAE."""

from __future__ import annotations

from pathlib import Path

from models.errors import CheckpointError

VOCABULARY_FILE = "vocab.txt"
BERT_REPOSITORIES = ("google-bert/bert-base-uncased", "bert-base-uncased")  # at Hugging Face
VOCABULARY_MISSING = (
    f"prompts need {VOCABULARY_FILE} of bert-base-uncased: next to the checkpoint, in the local Hugging Face "
    "cache, or named by LDM_VOCABULARY"
)
VAE_MISSING = "holds no VAE; give one with --vae"
TEXT_ENCODER_MISSING = (
    "prompts need CLIP ViT-L/14's text encoder, which the checkpoint does not contain; expected next to it: "
    "text_encoder/config.json, text_encoder/model.safetensors with text_projection.weight, and tokenizer/"
)


def find_vocabulary(folder: Path, given: Path | None = None) -> Path | None:
    """BERT's vocabulary for a checkpoint in `folder`, or None.

    The first of: the file given (or the one in the folder given), the one next to the checkpoint, the one in
    the local Hugging Face cache. Raises CheckpointError if a path was given and no vocabulary is there.
    """
    if given is not None:
        file = given / VOCABULARY_FILE if given.is_dir() else given
        if not file.is_file() or file.name != VOCABULARY_FILE:
            raise CheckpointError(f"{given} is neither a {VOCABULARY_FILE} file nor a folder with one")
        return file
    adjacent = folder / VOCABULARY_FILE
    return adjacent if adjacent.is_file() else find_cached_vocabulary()


def find_cached_vocabulary() -> Path | None:
    """The file that an earlier download by `transformers` left; never uses the network."""
    from huggingface_hub import try_to_load_from_cache  # importing it takes a second

    for repository in BERT_REPOSITORIES:
        found = try_to_load_from_cache(repository, VOCABULARY_FILE)
        if isinstance(found, str):
            return Path(found)
    return None

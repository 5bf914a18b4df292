"""What the paper's text models need and no single file carries: BERT's words, CLIP's text encoder.

Free of torch.
"""

from __future__ import annotations

from pathlib import Path

from models.errors import CheckpointError

NAME = "vocab.txt"
PUBLISHED = ("google-bert/bert-base-uncased", "bert-base-uncased")  # its names at Hugging Face
WANTED = (
    f"prompts need {NAME} of bert-base-uncased: beside the checkpoint, in the local Hugging Face cache, "
    "or named by LDM_VOCABULARY"
)


TEXT_WANTED = (
    "prompts need CLIP ViT-L/14's text encoder beside the checkpoint, which holds none: "
    "text_encoder/config.json, text_encoder/model.safetensors with text_projection.weight, and tokenizer/"
)


def find(checkpoint: Path, given: Path | None = None) -> Path | None:
    """The file of words for a checkpoint: the one given, the one beside it, or the cached one.

    given: the file, or its folder. Raises CheckpointError where what was given is not there.
    """
    if given is not None:
        file = given / NAME if given.is_dir() else given
        if not file.is_file() or file.name != NAME:
            raise CheckpointError(f"{given} is no {NAME}, and no folder with one")
        return file
    beside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / NAME
    return beside if beside.is_file() else cached()


def cached() -> Path | None:
    """What an earlier download by `transformers` has left; never asks the network."""
    from huggingface_hub import try_to_load_from_cache  # a second

    for name in PUBLISHED:
        found = try_to_load_from_cache(name, NAME)
        if isinstance(found, str):
            return Path(found)
    return None

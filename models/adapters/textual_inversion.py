"""Learned words (textual inversion, Gal et al. 2022): vectors that a word of a prompt becomes.

A file holds them by the word's name, as `emb_params`, under `string_to_param`, or, for two text encoders,
as `clip_l` and `clip_g`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint.folder import open_weights
from models.conditioning.conditioner import TextConditioner
from models.conditioning.text_encoder import TextEncoder
from models.errors import CheckpointError
from models.formats.safetensors import FLOATS
from models.latent_diffusion import LatentDiffusion
from models.spec import ModelSpec

PAIR = ("clip_l", "clip_g")  # of the first text encoder, of the second


@dataclass(frozen=True, eq=False)
class Embedding:
    """vectors: of each text encoder (k, C), float32 on the CPU."""

    name: str
    vectors: tuple[Tensor, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(vectors.shape[1] for vectors in self.vectors)

    def fits(self, spec: ModelSpec) -> bool:
        return bool(spec.texts) and self.widths == widths_of(spec)


def widths_of(spec: ModelSpec) -> tuple[int, ...]:
    """Of the vectors of tokens, one for each text encoder."""
    return tuple(text.width for text in spec.texts)


def read(name: str, file: Path, allow_pickle: bool = False) -> Embedding:
    """The vectors in a file. Raises CheckpointError."""
    weights = open_weights(file, "cpu", allow_pickle)
    keys = PAIR if set(weights.stored) == set(PAIR) else tuple(weights.stored)
    if keys != PAIR and len(keys) != 1:
        found = ", ".join(sorted(keys)[:4]) or "nothing"
        raise CheckpointError(
            f"embedding {name} ({file}) holds {found}; expected one tensor, or clip_l and clip_g"
        )
    for key in keys:
        entry = weights.stored[key]
        if entry.dtype not in FLOATS or len(entry.shape) not in (1, 2) or not entry.count:
            raise CheckpointError(
                f"embedding {name} ({file}): {key} is {entry.dtype} {entry.shape}; expected vectors (k, C)"
            )
    vectors = tuple(torch.atleast_2d(weights.read(key).float()) for key in keys)
    if not all(torch.isfinite(each).all() for each in vectors):
        raise CheckpointError(f"embedding {name} ({file}) has numbers that are not finite")
    return Embedding(name, vectors)


def read_all(
    files: Mapping[str, Path], specs: Iterable[ModelSpec], allow_pickle: bool = False
) -> tuple[Embedding, ...]:
    """The embeddings of files by name. Raises CheckpointError for one that fits no model."""
    specs = list(specs)
    found = tuple(read(name, file, allow_pickle) for name, file in files.items())
    for one in found:
        if not any(one.fits(spec) for spec in specs):
            reading = [f"{spec.name} takes {shown(widths_of(spec))}" for spec in specs if spec.texts]
            models = ", ".join(reading) or "no model has a text encoder of CLIP's"
            raise CheckpointError(
                f"embedding {one.name} ({files[one.name]}) has vectors {shown(one.widths)} wide; {models}"
            )
    return found


def shown(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))


def teach(bundle: LatentDiffusion, embeddings: Iterable[Embedding]) -> LatentDiffusion:
    """Let a model know the words that fit it, in place; returns it."""
    for one in embeddings:
        if one.fits(bundle.spec) and isinstance(bundle.conditioner, TextConditioner):
            for encoder, vectors in zip(bundle.conditioner.encoders, one.vectors, strict=True):
                learn(encoder, one.name, vectors)
    return bundle


@torch.no_grad()
def learn(encoder: TextEncoder, name: str, vectors: Tensor) -> None:
    """Append vectors (k, C) to the encoder's table, under ids of their own."""
    embeddings = encoder.transformer.embeddings
    table = embeddings.token_embedding.weight
    first = len(table)
    whole = torch.cat([table, vectors.to(table.device, table.dtype)])
    embeddings.token_embedding = nn.Embedding.from_pretrained(whole, freeze=True)
    encoder.learned_words[name.lower()] = tuple(range(first, first + len(vectors)))

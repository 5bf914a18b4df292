"""Learned embeddings (textual inversion, Gal et al. 2022): vectors that replace a word of a prompt.

In a file, the tensor is named like the word, `emb_params`, or lies below `string_to_param`; for two text
encoders there are two, `clip_l` and `clip_g`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint.weights import Weights, open_weights
from models.conditioning.conditioner import TextConditioner
from models.conditioning.text_encoder import TextEncoder
from models.errors import CheckpointError
from models.formats.lora_keys import BUNDLED_EMBEDDING
from models.formats.safetensors import FLOATS
from models.latent_diffusion import LatentDiffusion
from models.spec import ModelSpec

# Names of the vectors for the first and the second text encoder.
ENCODER_KEYS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
MAX_LISTED_KEYS = 4  # in an error message


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned word. vectors: (k, C) for each text encoder, float32 on the CPU."""

    name: str
    vectors: tuple[Tensor, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(vectors.shape[1] for vectors in self.vectors)

    def fits(self, spec: ModelSpec) -> bool:
        return bool(spec.texts) and self.widths == token_widths(spec)


def token_widths(spec: ModelSpec) -> tuple[int, ...]:
    """Width of a token's vector in each text encoder."""
    return tuple(text.width for text in spec.texts)


def read_embedding(name: str, file: Path, allow_pickle: bool = False) -> Embedding:
    """The vectors in a file. Raises CheckpointError."""
    return to_embedding(name, f"embedding {name} ({file})", open_weights(file, "cpu", allow_pickle))


def read_bundled(lora: str, file: Path, weights: Weights) -> tuple[Embedding, ...]:
    """The embeddings in a LoRA file, under bundle_emb.NAME. Raises CheckpointError."""
    names: dict[str, dict[str, str]] = defaultdict(dict)  # embedding -> its key -> key in the file
    for key in weights.stored:
        if key.startswith(BUNDLED_EMBEDDING):
            name, _, inner = key.removeprefix(BUNDLED_EMBEDDING).partition(".")
            names[name][inner] = key
    return tuple(
        to_embedding(name, f"LoRA {lora} ({file}): embedding {name}", weights.renamed(keys))
        for name, keys in names.items()
    )


def to_embedding(name: str, source: str, weights: Weights) -> Embedding:
    """The vectors of an embedding's tensors. Raises CheckpointError, with `source` in front."""
    pairs = (pair for pair in ENCODER_KEYS if set(weights.stored) == set(pair))
    keys = next(pairs, tuple(weights.stored))
    if keys not in ENCODER_KEYS and len(keys) != 1:
        found = ", ".join(sorted(keys)[:MAX_LISTED_KEYS]) or "nothing"
        raise CheckpointError(f"{source} has the tensors {found}; expected one tensor, or clip_l and clip_g")
    for key in keys:
        entry = weights.stored[key]
        if entry.dtype not in FLOATS or len(entry.shape) not in (1, 2) or not entry.count:
            raise CheckpointError(f"{source}: {key} is {entry.dtype} {entry.shape}; expected vectors (k, C)")
    vectors = tuple(torch.atleast_2d(weights.read(key).float().cpu()) for key in keys)
    if not all(torch.isfinite(each).all() for each in vectors):
        raise CheckpointError(f"{source} has NaN or infinite values")
    if len({len(each) for each in vectors}) > 1:
        raise CheckpointError(f"{source} has different numbers of vectors for the text encoders")
    return Embedding(name, vectors)


def read_embeddings(
    files: Mapping[str, Path], specs: Iterable[ModelSpec], allow_pickle: bool = False
) -> tuple[Embedding, ...]:
    """The embeddings in files by name. Raises CheckpointError for one that fits none of the models."""
    specs = list(specs)
    found = tuple(read_embedding(name, file, allow_pickle) for name, file in files.items())
    for embedding in found:
        check_fits(embedding, files[embedding.name], specs)
    return found


def check_fits(embedding: Embedding, file: Path, specs: Sequence[ModelSpec]) -> None:
    """Raise CheckpointError for an embedding that fits none of the models."""
    if any(embedding.fits(spec) for spec in specs):
        return
    expected = [f"{spec.name} takes {joined(token_widths(spec))}" for spec in specs if spec.texts]
    models = ", ".join(expected) or "no model has a CLIP text encoder"
    raise CheckpointError(
        f"embedding {embedding.name} ({file}) has vectors {joined(embedding.widths)} wide; {models}"
    )


def joined(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))


def add_embeddings(model: LatentDiffusion, embeddings: Iterable[Embedding]) -> LatentDiffusion:
    """Add the embeddings that fit to a model, in place; returns it."""
    for embedding in embeddings:
        if embedding.fits(model.spec) and isinstance(model.conditioner, TextConditioner):
            for encoder, vectors in zip(model.conditioner.encoders, embedding.vectors, strict=True):
                extend_vocabulary(encoder, embedding.name, vectors)
    return model


def change_words(model: LatentDiffusion, before: Sequence[Embedding], after: Sequence[Embedding]) -> None:
    """Replace the embeddings of a model, in place: `before` were added to it, `after` are wanted."""
    if isinstance(model.conditioner, TextConditioner):
        for word in {each.name.lower() for each in before} - {each.name.lower() for each in after}:
            for encoder in model.conditioner.encoders:
                encoder.learned_words.pop(word, None)
    add_embeddings(model, [each for each in after if each not in before])


@torch.no_grad()
def extend_vocabulary(encoder: TextEncoder, name: str, vectors: Tensor) -> None:
    """Append vectors (k, C) to the encoder's token embeddings, under new ids for the word `name`."""
    embeddings = encoder.transformer.embeddings
    table = embeddings.token_embedding.weight
    first = len(table)
    extended = torch.cat([table, vectors.to(table.device, table.dtype)])
    embeddings.token_embedding = nn.Embedding.from_pretrained(extended, freeze=True)
    encoder.learned_words[name.lower()] = tuple(range(first, first + len(vectors)))

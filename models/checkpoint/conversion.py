"""Converts a checkpoint of any supported layout into a folder of safetensors files."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from models.checkpoint.loading import load, open_model
from models.checkpoint.parts import OpenedModel, check
from models.checkpoint.saving import save, write_tensors
from models.errors import CheckpointError
from models.formats import ldm, ldm_json
from models.formats.averages import WeightChoice
from models.formats.companions import VOCABULARY_FILE
from models.formats.identify import Source, identify, with_unet
from models.formats.safetensors import FLOATS_OF_8_BITS
from models.spec import Prediction, TokenSpec


def convert(
    source: str | Path | Source,
    target: Path,
    dtype: str | None = None,
    allow_pickle: bool = False,
    prediction: Prediction | None = None,
    weights: WeightChoice = "auto",
    unet: Path | None = None,
) -> None:
    """Write a model as a folder that load() reads as the same model, completely or not at all.

    A diffusers folder becomes a diffusers folder, and so does a single file of Stable Diffusion. The weights
    of other single files keep their published names: averages replace the last weights, duplicates and
    unused tensors are left out, and facts that no tensor shows go into ldm.json. dtype: of the weights; None:
    unchanged, or float16 for weights of 8 bits. allow_pickle, prediction, weights: as for load(). unet: a
    folder or file of a UNet that takes the place of the model's own.
    Raises CheckpointError, also if the target exists and is not an empty folder.
    """
    if not isinstance(source, Source):
        source = identify(source, allow_pickle, prediction, weights)
    if unet:
        source = with_unet(source, unet)
    opened = open_model(source)
    check(opened)
    with complete_folder(target) as folder:
        if source.file is None or source.text_encoders:
            kind: torch.dtype = getattr(torch, dtype or most_common_type(opened))
            save(load(source, "cpu", kind), folder, kind)
        else:
            write_single_file(opened, folder, dtype)


def most_common_type(opened: OpenedModel) -> str:
    """The type that most tensors of the UNet have."""
    stored = opened.parts[0].weights.stored
    found = Counter(entry.dtype for entry in stored.values()).most_common(1)[0][0]
    return "float16" if found in FLOATS_OF_8_BITS else found  # float16 represents every 8-bit value


def write_single_file(opened: OpenedModel, folder: Path, dtype: str | None) -> None:
    """Write the weights, ldm.json, and the vocabulary or text encoder next to the source."""
    source, spec = opened.source, opened.spec
    tensors = published_tensors(opened)
    write_tensors(tensors, folder / ldm_json.WEIGHTS_FILE, getattr(torch, dtype) if dtype else None)
    ldm_json.write(folder, spec, source.family)
    vocabulary = source.folder / VOCABULARY_FILE
    if isinstance(spec.condition, TokenSpec) and vocabulary.is_file():
        shutil.copyfile(vocabulary, folder / VOCABULARY_FILE)
    if spec.texts:
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(source.folder / part, folder / part)


def published_tensors(opened: OpenedModel) -> dict[str, Tensor]:
    """Each network's weights under their CompVis names."""
    unet, autoencoder, conditioner = opened.networks
    prefixes = {unet: ldm.UNET, autoencoder: ldm.FIRST_STAGE if unet else "", conditioner: ldm.CONDITION}
    return {
        prefixes[part.network] + key: part.weights.read(name)
        for part in opened.parts
        if part.network in prefixes  # a text encoder next to the file is copied unchanged
        for key, name in part.names.items()
    }


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A new folder that becomes the target if no error occurs inside, and is removed otherwise.

    Raises CheckpointError.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty folder")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a folder")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            folder = temporary / "complete"  # only its owner can read mkdtemp's folder
            folder.mkdir()
            yield folder
            folder.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error

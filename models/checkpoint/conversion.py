"""Any layout we read -> a folder in safetensors that says all there is to know about its model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from models.checkpoint.folder import Opened, check, load, open_model, save, words_beside, write_tensors
from models.errors import CheckpointError
from models.formats import ldm, single_file, stable_diffusion
from models.formats.config_files import OWN_FILE
from models.formats.diffusers_read import OWN_KEYS
from models.spec import Prediction, TokenSpec


def convert(
    source: Path,
    target: Path,
    dtype: str | None = None,
    allow_pickle: bool = False,
    prediction: Prediction | None = None,
) -> None:
    """Write a model as a folder that load() reads back the same, whole or not at all.

    A diffusers folder becomes one, and so does a single file of Stable Diffusion. The weights of other single
    files keep their published names: averages are in the place of the last ones, copies and what no network
    takes are left out, and ldm.json says what no tensor does. dtype: of the weights; as they are if None.
    prediction: as of load(). Raises CheckpointError, also for a target that is there and not an empty folder.
    """
    opened = open_model(source, "cpu", allow_pickle, prediction)
    check(opened, source)
    with whole(target) as folder:
        if opened.weights is None or stable_diffusion.is_one(opened.weights.stored):
            kind = getattr(torch, dtype or most_common(opened))
            save(load(source, "cpu", kind, allow_pickle, prediction=prediction), folder, kind)
        else:
            write_single(opened, source, folder, dtype)


def most_common(opened: Opened) -> str:
    """The type that most tensors of the UNet have."""
    stored = opened.parts[0].weights.stored
    return Counter(entry.dtype for entry in stored.values()).most_common(1)[0][0]


def write_single(opened: Opened, source: Path, folder: Path, dtype: str | None) -> None:
    """Weights, ldm.json and words."""
    spec = opened.spec
    kind = single_file.kind_of(single_file.weights_of(source), opened.weights.stored, spec)
    write_tensors(published(opened), folder / single_file.WEIGHTS, dtype and getattr(torch, dtype))
    own = {key: asdict(spec)[key] for key in OWN_KEYS}
    own |= {single_file.OWN_KEY: single_file.own_config(spec, kind)}
    (folder / OWN_FILE).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
    if isinstance(spec.condition, TokenSpec) and words_beside(source).is_file():
        shutil.copyfile(words_beside(source), folder / "vocab.txt")
    if spec.texts:
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(single_file.weights_of(source).parent / part, folder / part)


def published(opened: Opened) -> dict[str, Tensor]:
    """Each network's weights under their CompVis names."""
    unet, autoencoder, conditioner = opened.networks
    prefixes = {unet: ldm.UNET, autoencoder: ldm.FIRST_STAGE if unet else "", conditioner: ldm.CONDITION}
    return {
        prefixes[part.network] + key: part.weights.read(name)
        for part in opened.parts
        if part.network in prefixes  # not what a text encoder beside the file has
        for key, name in part.names.items()
    }


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A new folder that becomes the target when all went well, and goes otherwise. Raises CheckpointError."""
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already and not an empty folder")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a folder")
    try:
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            folder = place / "whole"  # mkdtemp's own is for its owner only
            folder.mkdir()
            yield folder
            folder.rename(target)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error

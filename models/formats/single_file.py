"""A model in one file: where it is, what it is called, what it is. Free of torch.

Tensors come first, then what stands beside the file (a YAML file of CompVis's, or an ldm.json of ours), then
the tables of the paper's models and of Stable Diffusion's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from models.errors import CheckpointError
from models.formats import compvis_yaml, keymaps, ldm, stable_diffusion
from models.formats.config_files import OWN_FILE, Config, read_json, read_yaml
from models.formats.pickles import read_records
from models.formats.safetensors import Stored, safetensors_header, safetensors_metadata, values
from models.sampling.schedule import Schedule
from models.spec import BetaSchedule, ModelSpec, Prediction, ScheduleSpec, Spacing

WEIGHTS = "model.safetensors"  # in a folder of ours
OWN_KEY = "compvis"  # in its ldm.json
NAMELESS = "model"  # a stem that says nothing: the folder's name does
TOLERANCE = 1e-4  # relative, of betas and factors: some are float32


def weights_of(path: Path) -> Path | None:
    """The one file that a model's weights are in; None for a diffusers folder, or for nothing."""
    if path.is_file():
        return path
    inner = path / WEIGHTS
    return inner if inner.is_file() and own_folder(inner) else None


def own_folder(file: Path) -> Path | None:
    """The folder of a single file that ldm convert wrote."""
    own = file.parent / OWN_FILE
    return file.parent if file.name == WEIGHTS and own.is_file() and OWN_KEY in read_json(own) else None


def name_of(file: Path) -> str:
    """What a single file's model is called."""
    return file.resolve().parent.name if file.stem == NAMELESS else file.stem


def read_header(file: Path, allow_pickle: bool) -> dict[str, Stored]:
    """The tensors of a file. Raises CheckpointError, also for a pickled one that is not allowed."""
    if file.suffix == ".safetensors":
        return safetensors_header(file)
    if not allow_pickle:
        raise CheckpointError(f"{file} is not a .safetensors file; pickled weights need allow_pickle")
    return read_records(file)


def describe(file: Path, allow_pickle: bool, prediction: Prediction | None = None) -> ModelSpec:
    """What the model in a single file is.

    prediction: of a Stable Diffusion 2 file that neither says itself nor is told beside it. Raises
    CheckpointError, also where two sources contradict.
    """
    stored = read_header(file, allow_pickle)
    betas = values(file, stored["betas"]) if "betas" in stored else None
    scale = factor(file, stored["scale_factor"]) if "scale_factor" in stored else None
    note = None if own_folder(file) else compvis_yaml.find(file)
    config = read_yaml(note) if note else None
    said = own_said(file.parent / OWN_FILE) if own_folder(file) else None
    if config is not None:
        said = compvis_yaml.said(config, note)
        claimed = said.scale_factor
        if scale is not None and claimed and not near(claimed, scale):
            raise CheckpointError(f"{note}: scale_factor is {claimed}, but the weights have {scale}")
    shapes = {key: entry.shape for key, entry in stored.items()}
    first_last = None if betas is None else ends(file, betas)
    if stable_diffusion.is_one(shapes):
        said = with_prediction(file, shapes, said, prediction)
        spec = stable_diffusion.recognise(shapes, name_of(file), first_last, said)
    else:
        spec = ldm.recognise(shapes, name_of(file), first_last, scale, said)
    if config is not None:
        check_ends(note, said, spec)
        compvis_yaml.check(config, spec, note)
    if betas is not None:
        check_betas(file, betas, spec.schedule)
    if spec.upscaling and (low := stored.get(keymaps.LOW_SCALE + "betas")):
        check_betas(file, values(file, low), spec.upscaling.noise)
    if spec.defaults.width % spec.size_multiple:
        raise CheckpointError(f"{file}: pictures of {spec.defaults.width} pixels are no multiple of "
                              f"{spec.size_multiple}")  # fmt: skip
    return spec


def with_prediction(
    file: Path, shapes: ldm.Shapes, said: ldm.Said | None, given: Prediction | None
) -> ldm.Said:
    """What is predicted: as the file beside says, or the file itself; given, where none of them does."""
    said = said or ldm.Said()
    asked = given if stable_diffusion.is_open(shapes) else None
    found = said.prediction or own_prediction(file, shapes) or asked
    return replace(said, prediction=found)


def own_prediction(file: Path, shapes: ldm.Shapes) -> Prediction | None:
    """What a file says of itself, by a tensor of that name or in words; None: nothing."""
    if stable_diffusion.V_MARK in shapes:
        return "v_prediction"
    words = safetensors_metadata(file) if file.suffix == ".safetensors" else {}
    return stable_diffusion.WORDS.get(words.get(stable_diffusion.WORDS_KEY))


def is_guessed(file: Path, stored: Mapping[str, Stored]) -> bool:
    """Whether nothing says what a file's UNet predicts."""
    shapes = {key: entry.shape for key, entry in stored.items()}
    if not stable_diffusion.is_one(shapes) or not stable_diffusion.is_open(shapes):
        return False
    note = compvis_yaml.find(file)
    said = compvis_yaml.said(read_yaml(note), note) if note else None
    return with_prediction(file, shapes, said, None).prediction is None


def kind_of(file: Path, stored: Mapping[str, Stored], spec: ModelSpec) -> str | None:
    """The row of the table that a single file's model is of; None for a first stage alone."""
    if spec.unet is None:
        return None
    if stable_diffusion.is_one(shapes := {key: entry.shape for key, entry in stored.items()}):
        return stable_diffusion.kind(shapes, spec.schedule.prediction)
    if own_folder(file) and (said := own_said(file.parent / OWN_FILE)).kind:
        return said.kind
    return ldm.kind(shapes, spec.condition)


def near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=TOLERANCE)


def factor(file: Path, stored: Stored) -> float:
    """The factor of latents that a file holds."""
    numbers = values(file, stored)
    if numbers.size != 1 or not 0 < numbers.item() < math.inf:
        raise CheckpointError(f"{file}: its scale_factor is not one number above 0")
    return numbers.item()


def ends(file: Path, betas: np.ndarray) -> tuple[float, float]:
    """The first and last beta of a file, to seven digits: its numbers are float32."""
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise CheckpointError(f"{file}: its betas are no numbers between 0 and 1")
    return float(f"{betas[0]:.6e}"), float(f"{betas[-1]:.6e}")


def check_betas(file: Path, betas: np.ndarray, spec: ScheduleSpec) -> None:
    expected = Schedule(spec).betas
    if betas.shape != expected.shape or not np.allclose(betas, expected, rtol=TOLERANCE, atol=1e-8):
        raise CheckpointError(f"{file}: its betas are not {len(expected)} whose roots are evenly spaced")


def check_ends(note: Path, said: ldm.Said, spec: ModelSpec) -> None:
    """The betas of a file beside the weights against theirs."""
    if spec.unet and said.schedule:
        for option, claimed, actual in (
            ("linear_start", said.schedule.beta_start, spec.schedule.beta_start),
            ("linear_end", said.schedule.beta_end, spec.schedule.beta_end),
        ):
            if not near(claimed, actual):
                raise CheckpointError(f"{note}: {option} is {claimed}, but the weights have {actual}")


def own_said(file: Path) -> ldm.Said:
    """What our ldm.json says of a single file. Raises CheckpointError, naming what it cannot be."""
    own = read_json(file)[OWN_KEY]
    known = {field.name for field in fields(ldm.Said)} - {"head_width", "prediction"}
    if not isinstance(own, dict) or own.keys() - known:
        raise CheckpointError(f"{file}: {OWN_KEY} may hold {', '.join(sorted(known))} only")
    for option, value in own.items():
        if not OPTIONS[option](value):
            raise CheckpointError(f"{file}: {option} cannot be {str(value)[:80]}")
    schedule = own.get("schedule")
    return ldm.Said(
        kind=own.get("kind"),
        side=own.get("side"),
        heads=tuple(own["heads"]) if own.get("heads") else None,
        scale_factor=own.get("scale_factor"),
        schedule=schedule and ScheduleSpec(**schedule),
    )


def is_whole(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**16


def is_schedule(value: Any) -> bool:
    """A whole ScheduleSpec, as its fields."""
    if not isinstance(value, dict) or set(value) != {field.name for field in fields(ScheduleSpec)}:
        return False
    numbers = (value["beta_start"], value["beta_end"])
    return (
        all(type(number) is float and 0 < number < 1 for number in numbers)
        and value["beta_schedule"] in get_args(BetaSchedule)
        and value["prediction"] in get_args(Prediction)
        and value["spacing"] in get_args(Spacing)
        and is_whole(value["timesteps"])
        and type(value["steps_offset"]) is int
        and type(value["final_alpha_one"]) is bool
    )


OPTIONS = {
    "kind": lambda value: isinstance(value, str) and value in ldm.ROWS,
    "side": is_whole,
    "heads": lambda value: isinstance(value, list) and all(map(is_whole, value)),
    "scale_factor": lambda value: type(value) in (int, float) and 0 < value < math.inf,
    "schedule": is_schedule,
}


def own_config(spec: ModelSpec, kind: str | None) -> Config:
    """What own_said() reads of a model; kind: its row of the table, None for a first stage alone."""
    config: Config = {
        "side": spec.autoencoder.sample_size,
        "scale_factor": spec.autoencoder.scale_factor,
    }
    if spec.unet:
        config |= {"kind": kind, "heads": list(spec.unet.heads), "schedule": asdict(spec.schedule)}
    return config

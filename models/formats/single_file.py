"""Identifies the model in a single file by its tensors, its header, and the files next to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import CheckpointError
from models.formats import compvis_yaml, keymaps, ldm, ldm_json, stable_diffusion
from models.formats.hints import Hints
from models.formats.pickles import read_pickle
from models.formats.safetensors import Header, read_safetensors, read_values
from models.formats.stable_diffusion import EncoderLocation
from models.sampling.schedule import Schedule
from models.spec import ModelSpec, Prediction, ScheduleSpec

GENERIC_STEM = "model"  # a file name that identifies nothing; the folder's name is used instead
TOLERANCE = 1e-4  # relative, between betas and factors of two sources: some are float32

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class SingleFile:
    """What the model in a single file is.

    family: a key of ldm.FAMILIES or stable_diffusion.FAMILIES, or ldm.FIRST_STAGE_ALONE. text_encoders:
    where in the file they are. notes: what a user should know, and is no error.
    """

    spec: ModelSpec
    family: str
    header: Header
    text_encoders: tuple[EncoderLocation, ...] = ()
    notes: tuple[str, ...] = ()


def model_name(file: Path) -> str:
    """The name of a single file's model."""
    return file.absolute().parent.name if file.stem == GENERIC_STEM else file.stem


def read_header(file: Path, allow_pickle: bool) -> Header:
    """The tensors of a file. Raises CheckpointError, also for a pickled one if these are not allowed."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if not allow_pickle:
        raise CheckpointError(f"{file} is not a .safetensors file; pickled weights need allow_pickle")
    return read_pickle(file)


def identify_single_file(
    file: Path, own: ldm_json.LdmJson | None, allow_pickle: bool, prediction: Prediction | None
) -> SingleFile:
    """own: the ldm.json of a converted file. prediction: used if neither the file nor one next to it says.

    Raises CheckpointError, also if two sources contradict each other.
    """
    header = read_header(file, allow_pickle)
    betas = read_betas(file, header)
    scale_factor = read_scale_factor(file, header)
    config = None if own else compvis_yaml.find_config(file)
    hints = own.hints() if own else config.hints() if config else Hints()
    if config and scale_factor is not None and hints.scale_factor:
        check_equal(config.file, "scale_factor", hints.scale_factor, scale_factor)
    found = recognise(file, header, betas, scale_factor, hints, prediction)
    if config:
        if found.spec.unet and hints.schedule:
            check_equal(
                config.file, "linear_start", hints.schedule.beta_start, found.spec.schedule.beta_start
            )
            check_equal(config.file, "linear_end", hints.schedule.beta_end, found.spec.schedule.beta_end)
        config.check(found.spec)
    check_betas(file, betas, found.spec.schedule)
    if found.spec.upscaling and found.spec.upscaling.noise:
        low_resolution_betas = read_array(file, header, keymaps.LOW_SCALE + "betas")
        check_betas(file, low_resolution_betas, found.spec.upscaling.noise)
    if found.spec.defaults.width % found.spec.size_multiple:
        raise CheckpointError(
            f"{file}: the image size, {found.spec.defaults.width} pixels, is not a multiple of "
            f"{found.spec.size_multiple}"
        )
    return found


def recognise(
    file: Path,
    header: Header,
    betas: Array | None,
    scale_factor: float | None,
    hints: Hints,
    prediction: Prediction | None,
) -> SingleFile:
    """Of which family the tensors are, and the spec that follows."""
    shapes, name = header.shapes, model_name(file)
    ends = None if betas is None else (rounded(betas[0]), rounded(betas[-1]))
    encoders = stable_diffusion.find_text_encoders(shapes) if ldm.UNET + "out.2.weight" in shapes else ()
    if not encoders:
        if ldm.UNET + "out.2.weight" in shapes and stable_diffusion.is_refiner(shapes):
            raise CheckpointError(f"{name} is SDXL's refiner, which is not supported: SDXL's base model is")
        spec, family = ldm.recognise(shapes, name, ends, scale_factor, hints)
        return SingleFile(spec, family, header)
    ambiguous = stable_diffusion.prediction_is_ambiguous(shapes, encoders)
    found = hints.prediction or own_prediction(header)
    chosen = found or (prediction if ambiguous else None)
    spec, family = stable_diffusion.recognise(shapes, encoders, name, ends, replace(hints, prediction=chosen))
    notes = (prediction_note(spec),) if ambiguous and not found else ()
    return SingleFile(spec, family, header, encoders, notes)


def own_prediction(header: Header) -> Prediction | None:
    """What the UNet predicts, if a file says it by a marking tensor or in its metadata."""
    if stable_diffusion.V_PREDICTION_KEY in header.tensors:
        return "v_prediction"
    return stable_diffusion.METADATA_PREDICTIONS.get(header.metadata.get(stable_diffusion.METADATA_KEY, ""))


def prediction_note(spec: ModelSpec) -> str:
    return (
        f"no tensor shows whether the UNet predicts epsilon or v: assuming {spec.schedule.prediction}; "
        "a YAML file next to the checkpoint or --prediction can say otherwise"
    )


def read_array(file: Path, header: Header, key: str) -> Array | None:
    stored = header.tensors.get(key)
    return read_values(file, stored) if stored else None


def read_scale_factor(file: Path, header: Header) -> float | None:
    """The latents' scale factor, if the file contains it."""
    values = read_array(file, header, "scale_factor")
    if values is None:
        return None
    if values.size != 1 or not 0 < values.item() < math.inf:
        raise CheckpointError(f"{file}: its scale_factor is not one number above 0")
    return float(values.item())


def read_betas(file: Path, header: Header) -> Array | None:
    """The betas, if the file contains them."""
    betas = read_array(file, header, "betas")
    if betas is not None and (betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all()):
        raise CheckpointError(f"{file}: its betas are not numbers between 0 and 1")
    return betas


def rounded(beta: float) -> float:
    """To seven digits: files have float32."""
    return float(f"{beta:.6e}")


def check_betas(file: Path, betas: Array | None, spec: ScheduleSpec) -> None:
    """Raise CheckpointError unless a file's betas, if it contains them, are those of a schedule."""
    if betas is None:
        return
    expected = Schedule(spec).betas
    if betas.shape != expected.shape or not np.allclose(betas, expected, rtol=TOLERANCE, atol=1e-8):
        raise CheckpointError(f"{file}: its betas are not {len(expected)} with evenly spaced square roots")


def check_equal(file: Path, option: str, claimed: float, actual: float) -> None:
    """Raise CheckpointError if a configuration and the weights have different numbers."""
    if not math.isclose(claimed, actual, rel_tol=TOLERANCE):
        raise CheckpointError(f"{file}: {option} is {claimed}, but the weights have {actual}")

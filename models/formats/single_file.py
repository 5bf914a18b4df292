"""Identifies the model in a single file by its tensors, its header, and the files next to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from models.errors import CheckpointError
from models.formats import compvis_yaml, edm, few_step, keymaps, ldm, ldm_json, stable_diffusion
from models.formats.averages import Chosen, WeightChoice, choose, with_averages_alone
from models.formats.hints import Hints
from models.formats.pickles import read_pickle
from models.formats.predictions import Known, has_zero_terminal_snr, read_prediction
from models.formats.safetensors import Header, is_safetensors, read_safetensors
from models.formats.schedule_tensors import (
    Ends,
    Table,
    check_betas,
    check_equal,
    ends_of,
    read_betas,
    read_scale_factor,
)
from models.formats.stable_diffusion import EncoderLocation
from models.formats.unsupported import refuse_other_models, refuse_unet_alone
from models.spec import ModelSpec, Prediction

FILE_NAME = "the file's name"  # as an origin
GENERIC_STEM = "model"  # a file name that says nothing; the folder's name is used instead


@dataclass(frozen=True)
class SingleFile:
    """The identified model of a single file.

    family: a key of ldm.FAMILIES or stable_diffusion.FAMILIES, or ldm.FIRST_STAGE_ALONE. text_encoders:
    where in the file they are. lacks_vae, averaged, prediction_origin, notes: as in identify.Source.
    """

    spec: ModelSpec
    family: str
    header: Header
    text_encoders: tuple[EncoderLocation, ...] = ()
    averaged: bool = False
    lacks_vae: bool = False
    prediction_origin: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Values that a weights file contains besides its networks; None if it does not contain them."""

    betas: Table | None
    ends: Ends | None  # of the betas
    scale_factor: Table | None


def model_name(file: Path) -> str:
    """The name of a single file's model."""
    return file.absolute().parent.name if file.stem == GENERIC_STEM else file.stem


def read_header(file: Path, allow_pickle: bool) -> Header:
    """The tensors of a file. Raises CheckpointError, also for a pickled one if these are not allowed."""
    if is_safetensors(file):
        return read_safetensors(file)
    if not allow_pickle:
        raise CheckpointError(f"{file} is not a .safetensors file; pickled weights need allow_pickle")
    return read_pickle(file)


def identify_single_file(
    file: Path,
    own: ldm_json.LdmJson | None,
    allow_pickle: bool,
    prediction: Prediction | None,
    weights: WeightChoice = "auto",
) -> SingleFile:
    """Identify the model in a single file.

    own: the ldm.json of a converted file. prediction: used if neither the file nor a file next to it gives
    one. Raises CheckpointError, also if two sources contradict each other.
    """
    header = read_header(file, allow_pickle)
    config = None if own else compvis_yaml.find_config(file)
    hints = own.hints() if own else config.hints() if config else Hints()
    facts = read_facts(file, header, hints)
    if config and facts.scale_factor is not None and hints.scale_factor:
        value, tolerance = facts.scale_factor.values.item(), facts.scale_factor.tolerance
        check_equal(config.file, "scale_factor", hints.scale_factor, value, tolerance)
    found = recognise(file, header, facts, hints, prediction, weights)
    if config:
        if found.spec.unet and hints.schedule:
            check_equal(
                config.file, "linear_start", hints.schedule.beta_start, found.spec.schedule.beta_start
            )
            check_equal(config.file, "linear_end", hints.schedule.beta_end, found.spec.schedule.beta_end)
        config.check(found.spec)
    check_betas(file, facts.betas, found.spec.schedule)
    if found.spec.upscaling and found.spec.upscaling.noise:
        low_resolution_betas = read_betas(file, header, keymaps.LOW_SCALE + "betas")
        check_betas(file, low_resolution_betas, found.spec.upscaling.noise)
    if found.spec.defaults.width % found.spec.size_multiple:
        raise CheckpointError(
            f"{file}: the image size, {found.spec.defaults.width} pixels, is not a multiple of "
            f"{found.spec.size_multiple}"
        )
    return found


def read_facts(file: Path, header: Header, hints: Hints) -> Facts:
    betas = read_betas(file, header)
    return Facts(betas, ends_of(betas, known_ends(hints)) if betas else None, read_scale_factor(file, header))


def known_ends(hints: Hints) -> Iterator[Ends]:
    """Ends of the betas of published models."""
    if hints.schedule:
        yield Ends(hints.schedule.beta_start, hints.schedule.beta_end)
    yield from (Ends(*family.betas) for family in stable_diffusion.FAMILIES.values())
    yield from (Ends(family.beta_start, family.beta_end) for family in ldm.FAMILIES.values())


def recognise(
    file: Path,
    header: Header,
    facts: Facts,
    hints: Hints,
    prediction: Prediction | None,
    weights: WeightChoice,
) -> SingleFile:
    """The family that the tensors belong to, and the model's spec."""
    shapes, name = with_averages_alone(header.shapes), model_name(file)
    refuse_other_models(shapes, name)
    encoders = stable_diffusion.find_text_encoders(shapes) if ldm.UNET + "out.2.weight" in shapes else ()
    chosen = choose(header.shapes, bool(encoders), weights)
    if encoders:
        return recognise_stable_diffusion(file, name, header, facts, hints, prediction, encoders, chosen)
    refuse_unet_alone(shapes, name)
    scale = None if facts.scale_factor is None else facts.scale_factor.values.item()
    if facts.scale_factor and not facts.scale_factor.exact and hints.scale_factor:
        scale = hints.scale_factor  # the same number, not rounded
    spec, family = ldm.recognise(shapes, name, facts.ends, scale, hints)
    origin = str(hints.origin) if hints.prediction else "the family"
    return SingleFile(
        spec,
        family,
        header,
        averaged=chosen.averaged,
        prediction_origin=origin,
        notes=notes_of(chosen),
    )


def recognise_stable_diffusion(
    file: Path,
    name: str,
    header: Header,
    facts: Facts,
    hints: Hints,
    prediction: Prediction | None,
    encoders: tuple[EncoderLocation, ...],
    chosen: Chosen,
) -> SingleFile:
    shapes = with_averages_alone(header.shapes)
    ambiguous = stable_diffusion.prediction_is_ambiguous(shapes, encoders)
    known, notes = read_prediction(name, header), notes_of(chosen)
    if known and hints.prediction not in (None, known.prediction):
        notes += (f"{known.origin} says {known.prediction}; {hints.origin} says otherwise and is ignored",)
    if known is None and hints.prediction:
        known = Known(hints.prediction, str(hints.origin))
    if known is None and few_step.predicts_x_0(name):
        known = Known("sample", FILE_NAME)
    if known is None and ambiguous and prediction:
        known = Known(prediction, "--prediction, or its default")
    hints = replace(hints, prediction=known.prediction if known else None)
    spec, family = stable_diffusion.recognise(shapes, encoders, name, facts.ends, hints)
    if spec.schedule.prediction == "v_prediction" and (
        has_zero_terminal_snr(header) or (facts.betas and facts.betas.zero_terminal_snr)
    ):
        spec = replace(spec, schedule=replace(spec.schedule, zero_terminal_snr=True, spacing="trailing"))
    spec = edm.with_tensors(spec, file, header)
    origin = known.origin if known else "assumed" if ambiguous else "the family"
    assumed = ambiguous and origin in ("assumed", "--prediction, or its default")
    notes = ((prediction_note(spec),) if assumed else ()) + notes
    if origin == FILE_NAME:
        notes += ("its UNet predicts x_0, according to the file's name",)
    return SingleFile(
        spec,
        family,
        header,
        text_encoders=encoders,
        lacks_vae=not ldm.below(shapes, ldm.FIRST_STAGE),
        averaged=chosen.averaged,
        prediction_origin=origin,
        notes=notes,
    )


def notes_of(chosen: Chosen) -> tuple[str, ...]:
    return (chosen.note,) if chosen.note else ()


def prediction_note(spec: ModelSpec) -> str:
    return (
        f"no tensor shows whether the UNet predicts epsilon or v: assuming {spec.schedule.prediction}; "
        "a YAML file next to the checkpoint or --prediction can say otherwise"
    )

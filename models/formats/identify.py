"""Identifies the checkpoint at a path once, by its configuration files and tensor headers.

    folder with model_index.json               diffusers_read
    single file: Stable Diffusion              single_file -> stable_diffusion
    single file: the paper's models            single_file -> ldm
    folder of a converted single file          the same, with hints from ldm_json

Everything later (loading, inspecting, converting) takes the Source that identify() returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from models.errors import CheckpointError
from models.formats import adapter_files, companions, few_step, ldm, ldm_json
from models.formats.averages import WeightChoice
from models.formats.diffusers_read import (
    config_file,
    names_in_folder,
    pooled_text_spec,
    read_folder,
    read_part,
)
from models.formats.diffusers_tables import ADDED_KEY, INDEX_FILE, SCHEDULER
from models.formats.safetensors import Header
from models.formats.single_file import FILE_NAME, SingleFile, identify_single_file
from models.formats.stable_diffusion import EDITING, INPAINTING, REFINER, EncoderLocation
from models.formats.unet_files import UNetFile, read_unet_file, with_unet_spec
from models.formats.vae_files import read_vae_spec
from models.spec import ALL_TASKS, ModelSpec, Prediction

Layout = Literal["diffusers folder", "single file", "folder of a single file"]

STABLE_DIFFUSION = {  # width of the context -> family of a diffusers folder
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
}


@dataclass(frozen=True)
class Source:
    """An identified checkpoint.

    file, header, text_encoders: of a single file only. text_encoders: those inside the file; if it contains
    none although spec.texts has some, they are in `folder`. notes: facts that the user should know, no
    errors.
    """

    path: Path
    layout: Layout
    family: str
    spec: ModelSpec
    folder: Path  # the folder with the weights and all files that belong to them
    allow_pickle: bool
    prediction: Prediction | None = None  # as given to identify()
    file: Path | None = None
    header: Header = field(default_factory=lambda: Header({}))
    text_encoders: tuple[EncoderLocation, ...] = ()
    weights: WeightChoice = "auto"  # as given to identify()
    lacks_vae: bool = False  # the single file has no autoencoder, see with_vae()
    vae: Path | None = None  # of a single file without its own: the folder or file of the autoencoder
    unet: UNetFile | None = None  # that takes the place of the model's own, see with_unet()
    averaged: bool = False  # the UNet's averaged weights (EMA) are used
    prediction_origin: str = ""  # the source of spec.schedule.prediction: a file, an option or the family
    notes: tuple[str, ...] = ()
    state: tuple[int, ...] = ()  # of the single file when it was read, see file_state()


def identify(
    path: str | Path,
    allow_pickle: bool = False,
    prediction: Prediction | None = None,
    weights: WeightChoice = "auto",
) -> Source:
    """Identify the checkpoint in a diffusers folder or in a single file, without reading weights.

    allow_pickle: also look at .ckpt files, which never run code even then. prediction: what the UNet of a
    Stable Diffusion 2 file predicts, if neither the file nor a YAML file next to it says; None: v. weights:
    which weights to use of a UNet that has trained and averaged ones; auto: the trained ones of Stable
    Diffusion, the averages of the paper's models. Raises CheckpointError, naming the file and the option.
    """
    path = Path(path)
    own = ldm_json.read(path) if path.is_dir() else None
    if path.is_file():
        if path.name == ldm_json.WEIGHTS_FILE:
            own = ldm_json.read(path.parent)
            own = own if own and own.describes_single_file else None
        return from_single_file(path, path, own, allow_pickle, prediction, weights)
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a folder nor a .safetensors or .ckpt file")
    if not (path / INDEX_FILE).is_file() and (adapter := adapter_files.in_folder(path)):
        raise CheckpointError(adapter.usage)
    file = path / ldm_json.WEIGHTS_FILE
    if own and own.describes_single_file and file.is_file():
        return from_single_file(path, file, own, allow_pickle, prediction, weights)
    spec = read_folder(path)
    if own:
        spec = own.with_inputs(spec)
    check_fit(spec, path)
    names = [*ldm_json_name(own), *names_in_folder(path), ("the folder's name", path.absolute().name)]
    spec, note = few_step.with_few_steps(spec, names)
    if own:
        spec = own.with_defaults(spec)
    return Source(
        path,
        "diffusers folder",
        folder_family(spec),
        spec,
        path,
        allow_pickle,
        prediction,
        weights=weights,
        prediction_origin=f"{SCHEDULER}/scheduler_config.json",
        notes=(note,) if note else (),
    )


def read_spec(
    path: str | Path,
    allow_pickle: bool = False,
    prediction: Prediction | None = None,
    weights: WeightChoice = "auto",
) -> ModelSpec:
    """The spec of the checkpoint at a path. Arguments and errors are those of identify()."""
    return identify(path, allow_pickle, prediction, weights).spec


def refreshed(source: Source) -> Source:
    """The source, identified again if its file has changed since it was identified."""
    if source.file is None or file_state(source.file) == source.state:
        return source
    found = identify(source.path, source.allow_pickle, source.prediction, source.weights)
    if source.vae and found.lacks_vae:
        found = with_vae(found, source.vae)
    if source.unet:
        found = with_unet(found, source.unet.path)
    return replace(found, spec=replace(found.spec, name=source.spec.name))


def with_unet(source: Source, unet: Path) -> Source:
    """A model with the UNet at a path in place of its own. Raises CheckpointError if that is no UNet."""
    file = read_unet_file(unet, source.allow_pickle)
    spec, notes = with_unet_spec(source.spec, file)
    check_fit(spec, unet)
    return replace(source, spec=spec, unet=file, averaged=False, notes=source.notes + notes)


def with_vae(source: Source, vae: Path) -> Source:
    """A model without an autoencoder, with the VAE at a path. Raises CheckpointError if that is no VAE."""
    spec = source.spec
    autoencoder = read_vae_spec(vae, spec.autoencoder, source.allow_pickle)
    return replace(source, spec=replace(spec, autoencoder=autoencoder), lacks_vae=False, vae=vae)


def is_checkpoint(path: Path) -> bool:
    """Whether there may be a checkpoint at a path. Looks only at names of files."""
    converted = (path / ldm_json.FILE_NAME).is_file() and (path / ldm_json.WEIGHTS_FILE).is_file()
    return path.is_file() or (path / INDEX_FILE).is_file() or converted


def file_state(file: Path) -> tuple[int, ...]:
    """Numbers that change when a file is replaced or written; () if it is missing."""
    try:
        state = file.stat()
    except OSError:
        return ()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def from_single_file(
    path: Path,
    file: Path,
    own: ldm_json.LdmJson | None,
    allow_pickle: bool,
    prediction: Prediction | None,
    weights: WeightChoice,
) -> Source:
    state = file_state(file)
    found = identify_single_file(file, own, allow_pickle, prediction, weights)
    spec = with_adjacent_text_encoder(found.spec, file.parent)
    if spec.texts:
        check_fit(spec, path)
    names = [*ldm_json_name(own), *few_step.header_names(found.header.metadata), (FILE_NAME, spec.name)]
    spec, note = few_step.with_few_steps(spec, names)
    if own:
        spec = own.with_defaults(own.with_inputs(spec))
    notes = (note,) if note else ()
    missing = (companions.TEXT_ENCODER_MISSING,) if spec.lacks_text_encoder else ()
    return Source(
        path=path,
        layout="single file" if path == file else "folder of a single file",
        family=single_file_family(found),
        spec=spec,
        folder=file.parent,
        allow_pickle=allow_pickle,
        prediction=prediction,
        file=file,
        header=found.header,
        text_encoders=found.text_encoders,
        weights=weights,
        lacks_vae=found.lacks_vae,
        averaged=found.averaged,
        prediction_origin=found.prediction_origin if spec.unet else "",
        notes=found.notes + notes + missing,
        state=state,
    )


def ldm_json_name(own: ldm_json.LdmJson | None) -> list[tuple[str, str]]:
    """(origin, name) of the name in an ldm.json."""
    name = own.values.get("name") if own else None
    return [(f"name in {ldm_json.FILE_NAME}", name)] if isinstance(name, str) else []


def single_file_family(found: SingleFile) -> str:
    """The family; for a first stage alone with its kind, VQ or KL."""
    if found.family != ldm.FIRST_STAGE_ALONE:
        return found.family
    autoencoder = found.spec.autoencoder
    return f"{found.family} ({'VQ' if autoencoder.codes else 'KL'}-f{autoencoder.factor})"


def folder_family(spec: ModelSpec) -> str:
    """The family of the model in a diffusers folder, by its structure."""
    if spec.upscaling and spec.texts:
        return "Stable Diffusion x4 upscaler"
    if spec.upscaling:
        noise = " with noise conditioning" if spec.upscaling.noise else ""
        return f"super-resolution, {spec.autoencoder.factor}x{noise}"
    if spec.aesthetic_score:
        return REFINER
    width = spec.unet.context_width if spec.unet else 0
    family = STABLE_DIFFUSION.get(width, "text (Stable Diffusion's structure)")
    return family + (INPAINTING if spec.mask_channels else EDITING if spec.edits else "")


def with_adjacent_text_encoder(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec of a single file, with the text encoder next to the file if it needs one and there is one."""
    if not spec.lacks_text_encoder or not (folder / "text_encoder").is_dir():
        return spec
    text = read_part(folder, "text_encoder", pooled_text_spec)
    if spec.unet and text.projection != spec.unet.context_width:
        raise CheckpointError(
            f"{config_file(folder, 'text_encoder')}: projection_dim is {text.projection}, "
            f"but the UNet expects contexts {spec.unet.context_width} wide"
        )
    # Published with zeros as the context of unconditional rows (Blattmann et al. 2022).
    return replace(spec, texts=(text,), tasks=ALL_TASKS[:3], zero_null=True)


def check_fit(spec: ModelSpec, path: Path) -> None:
    """Raise CheckpointError for networks that do not fit together."""
    unet, latent = spec.unet, spec.autoencoder.latent_channels
    if unet is None:
        return
    expected = latent + spec.concat_channels
    if (unet.in_channels, unet.out_channels) != (expected, latent):
        raise CheckpointError(
            f"{path}: the UNet has {unet.in_channels} input and {unet.out_channels} output channels, "
            f"expected {expected} and {latent}: the autoencoder's latents have {latent}"
        )
    noise = spec.upscaling.noise if spec.upscaling else None
    max_level = spec.upscaling.max_noise_level if spec.upscaling and noise else 0
    if bool(unet.noise_levels) != bool(noise) or max_level > max(unet.noise_levels - 1, 0):
        raise CheckpointError(
            f"{path}: the UNet has {unet.noise_levels} noise levels; max_noise_level is {max_level}"
        )
    added = sum(text.pooled for text in spec.texts) + spec.size_numbers * unet.size_width
    if unet.added_width != added:
        raise CheckpointError(
            f"{path}: the UNet expects {unet.added_width} numbers of pooled text and sizes ({ADDED_KEY}); "
            f"the text encoders and sizes give {added}"
        )
    width = sum(text.projection or text.width for text in spec.texts)
    if spec.texts and unet.context_width != width:
        raise CheckpointError(
            f"{path}: the UNet expects contexts {unet.context_width} wide, the text encoders give {width}"
        )

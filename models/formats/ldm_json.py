"""ldm.json: a file in folders written by this project, with facts that the published layouts cannot hold.

In a diffusers folder it holds the model's name, defaults, tasks and labels. In a folder with a single file in
the CompVis layout, as `ldm convert` writes it, it also holds, below `compvis`, facts that the tensors do not
show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from models.errors import CheckpointError
from models.formats import ldm
from models.formats.config_files import Config, read_json, shortened
from models.formats.hints import Hints
from models.spec import (
    ALL_TASKS,
    BetaSchedule,
    Defaults,
    ModelSpec,
    NoiseSpacing,
    Prediction,
    ScheduleSpec,
    TimestepSpacing,
)

FILE_NAME = "ldm.json"
WEIGHTS_FILE = "model.safetensors"  # of a folder with a single file
COMPVIS = "compvis"  # the key of the facts about a single file
UPSCALING_FLAGS = ("residual", "back_projection")  # keys of upscalers: flags of UpscalingSpec
SPEC_KEYS = ("name", "defaults", "tasks", "layout_channels", "labels")
UNUSED = {"first_timestep", "sigma_range", "sigma_data"}  # fields of a schedule that no such model has
OPTIONAL = {"zero_terminal_snr"} | UNUSED  # fields of a schedule that files may lack
SPACING = "spacing"  # an optional key of the defaults
MAX_LAYOUT_CHANNELS = 1024
MAX_SIZE = 2**16
FORMER_FAMILIES = {  # names of families in files of earlier versions -> names now
    "class": "class-conditional",
    "class or none": "class-conditional with guidance",
    "masked picture": "inpainting",
    "low-resolution picture": "super-resolution",
    "neighbours": "retrieval-augmented",
}


@dataclass(frozen=True)
class LdmJson:
    """The contents of a folder's ldm.json."""

    file: Path
    values: Config

    @property
    def describes_single_file(self) -> bool:
        return COMPVIS in self.values

    def hints(self) -> Hints:
        """The facts about the single file. Raises CheckpointError, naming the invalid option."""
        own = self.values[COMPVIS]
        if not isinstance(own, dict) or own.keys() - CHECKS.keys():
            raise CheckpointError(f"{self.file}: {COMPVIS} may have {', '.join(sorted(CHECKS))} only")
        for option, value in own.items():
            if not CHECKS[option](value):
                raise CheckpointError(f"{self.file}: {option} cannot be {shortened(value)}")
        schedule, family = own.get("schedule"), own.get("kind")
        return Hints(
            origin=self.file,
            family=FORMER_FAMILIES.get(family, family) if family else None,
            image_size=own.get("side"),
            heads=tuple(own["heads"]) if own.get("heads") else None,
            scale_factor=own.get("scale_factor"),
            schedule=ScheduleSpec(**schedule) if schedule else None,
        )

    def with_inputs(self, spec: ModelSpec) -> ModelSpec:
        """The spec with the file's tasks, labels and layout channels."""
        channels, labels = self.values.get("layout_channels", 0), self.values.get("labels", [])
        tasks, flags = self.values.get("tasks", list(spec.tasks)), self._upscaling_flags(spec)
        if type(channels) is not int or not 0 <= channels <= MAX_LAYOUT_CHANNELS:
            raise CheckpointError(
                f"{self.file}: layout_channels must be a whole number from 0 to {MAX_LAYOUT_CHANNELS}"
            )
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise CheckpointError(f"{self.file}: labels must be a list of strings")
        if not isinstance(tasks, list) or not all(task in ALL_TASKS for task in tasks):
            raise CheckpointError(f"{self.file}: tasks must be a list of {', '.join(ALL_TASKS)}")
        if spec.upscaling:
            residual, corrected = (flags[key] for key in UPSCALING_FLAGS)
            upscaling = replace(spec.upscaling, residual=residual, back_projection=corrected)
            spec = replace(spec, upscaling=upscaling)
        return replace(spec, layout_channels=channels, labels=tuple(labels), tasks=tuple(tasks))

    def _upscaling_flags(self, spec: ModelSpec) -> dict[str, bool]:
        flags = {key: self.values.get(key, False) for key in UPSCALING_FLAGS}
        for key, value in flags.items():
            if type(value) is not bool or (value and not spec.upscaling):
                raise CheckpointError(f"{self.file}: {key} must be true or false, and is for upscalers only")
        return flags

    def with_defaults(self, spec: ModelSpec) -> ModelSpec:
        """The spec with the file's name and defaults. Raises CheckpointError also for unknown keys."""
        values, name = self.values.get("defaults", {}), self.values.get("name", spec.name)
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.file}: defaults must be an object")
        types = {field.name: type(getattr(Defaults(), field.name)) for field in fields(Defaults)}
        spacing = values.get(SPACING)
        if spacing is not None and spacing not in get_args(TimestepSpacing) + get_args(NoiseSpacing):
            raise CheckpointError(f"{self.file}: {SPACING} cannot be {shortened(spacing)}")
        known = (*SPEC_KEYS, *UPSCALING_FLAGS, COMPVIS)
        for key in [k for k in self.values if k not in known] + [k for k in values if k not in types]:
            raise CheckpointError(
                f"{self.file}: {shortened(key)} is unknown; defaults may have {', '.join(types)}"
            )
        for key, value in ((key, value) for key, value in values.items() if key != SPACING):
            accepted = (int, float) if types[key] is float else types[key]
            if isinstance(value, bool) or not isinstance(value, accepted):
                raise CheckpointError(
                    f"{self.file}: {key} must be {types[key].__name__}, not {shortened(value)}"
                )
        for key in ("width", "height"):
            value = values.get(key, spec.size_multiple)
            if value < 1 or value % spec.size_multiple:
                raise CheckpointError(
                    f"{self.file}: {key} must be a multiple of {spec.size_multiple}, not {shortened(value)}"
                )
        return replace(spec, name=str(name), defaults=replace(spec.defaults, **values))


def read(folder: Path) -> LdmJson | None:
    """The folder's ldm.json, if it has one. Raises CheckpointError if it cannot be read."""
    file = folder / FILE_NAME
    return LdmJson(file, read_json(file)) if file.exists() else None


def write(folder: Path, spec: ModelSpec, single_file_family: str | None = None) -> None:
    """Write the file of a model. single_file_family: the family, for a folder with a single file."""
    values: Config = {key: asdict(spec)[key] for key in SPEC_KEYS}
    if spec.defaults.spacing is None:
        del values["defaults"][SPACING]
    if spec.upscaling:
        values |= {key: True for key in UPSCALING_FLAGS if getattr(spec.upscaling, key)}
    if single_file_family is not None:
        values[COMPVIS] = compvis_values(spec, single_file_family)
    (folder / FILE_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def compvis_values(spec: ModelSpec, family: str) -> Config:
    """The values below COMPVIS, which LdmJson.hints() reads."""
    values: Config = {"side": spec.autoencoder.sample_size, "scale_factor": spec.autoencoder.scale_factor}
    schedule = {key: value for key, value in asdict(spec.schedule).items() if key not in UNUSED}
    if spec.unet:
        values |= {"kind": family, "heads": list(spec.unet.heads), "schedule": schedule}
    return values


def is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIZE


def is_schedule(value: Any) -> bool:
    """Whether a value has all fields of ScheduleSpec, and only these; older files lack zero_terminal_snr."""
    expected = {field.name for field in fields(ScheduleSpec)}
    if not isinstance(value, dict) or set(value) | OPTIONAL != expected:
        return False
    betas = (value["beta_start"], value["beta_end"])
    return (
        all(type(beta) is float and 0 < beta < 1 for beta in betas)
        and value["beta_schedule"] in get_args(BetaSchedule)
        and value["prediction"] in get_args(Prediction)
        and value["spacing"] in get_args(TimestepSpacing)
        and is_size(value["timesteps"])
        and type(value["steps_offset"]) is int
        and type(value["final_alpha_one"]) is bool
        and not UNUSED & value.keys()
        and type(value.get("zero_terminal_snr", False)) is bool
    )


CHECKS: dict[str, Callable[[Any], bool]] = {  # options below COMPVIS -> whether a value is valid
    "kind": lambda value: isinstance(value, str) and (value in ldm.FAMILIES or value in FORMER_FAMILIES),
    "side": is_size,
    "heads": lambda value: isinstance(value, list) and all(map(is_size, value)),
    "scale_factor": lambda value: type(value) in (int, float) and 0 < value < math.inf,
    "schedule": is_schedule,
}

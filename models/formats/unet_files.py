"""A UNet in a folder or file of its own, which takes the place of a model's UNet. Reads no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from models.errors import CheckpointError
from models.formats import few_step, ldm
from models.formats.config_files import read_json
from models.formats.diffusers_read import translated, unet_spec
from models.formats.predictions import read_prediction
from models.formats.safetensors import Header
from models.formats.single_file import FILE_NAME, read_header
from models.spec import ModelSpec

DIFFUSERS_KEY = "time_embedding.linear_1.weight"  # of UNets with the names of diffusers only
STEM = "diffusion_pytorch_model"  # a file name that says nothing; the folder's name is used instead
LAST_KEYS = ("conv_out.weight", "out.2.weight")  # of a UNet, with the names of diffusers or of CompVis
PREFIXES = (ldm.UNET, "diffusion_model.", "unet.", "")  # before the names in files


@dataclass(frozen=True)
class UNetFile:
    """A UNet in `path`; header: of a file."""

    path: Path
    header: Header | None

    @property
    def name(self) -> str:
        """The name of the file or folder, without what says nothing."""
        generic = self.path.stem.startswith(STEM) or self.path.name == "unet"
        folder = self.path.absolute().parent
        return (folder.parent if folder.name == "unet" else folder).name if generic else self.path.stem

    @property
    def prefix(self) -> str:
        """What stands before the names of the UNet's tensors."""
        keys = tuple(self.header.tensors) if self.header else ()
        present = (prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in keys))
        return next(present, "")

    @property
    def is_diffusers(self) -> bool:
        """Whether tensors have the names of diffusers."""
        return self.header is None or self.prefix + DIFFUSERS_KEY in self.header.tensors


def read_unet_file(path: Path, allow_pickle: bool) -> UNetFile:
    """Raises CheckpointError for a file that cannot be read or contains no UNet."""
    if path.is_dir():
        return UNetFile(path, None)
    header = read_header(path, allow_pickle)
    found = UNetFile(path, header)
    if not {found.prefix + key for key in LAST_KEYS} & header.tensors.keys():
        raise CheckpointError(f"{path} contains no UNet")
    return found


def with_unet_spec(spec: ModelSpec, file: UNetFile) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec of a model with another UNet, and notes. Raises CheckpointError if it cannot fit.

    The shape of a UNet in a file is the model's own, but for the guidance scale as an input.
    """
    unet = spec.unet_spec
    if file.header is None:
        config = file.path / "config.json"
        unet = translated(config, unet_spec, read_json(config))
        known, names = None, [("the folder's name", file.name)]
    else:
        shapes = ldm.below(file.header.shapes, file.prefix) if file.prefix else file.header.shapes
        keys = (ldm.GUIDANCE_KEY, ldm.OTHER_GUIDANCE_KEY)
        unet = replace(unet, guidance_width=next((shapes[key][1] for key in keys if key in shapes), 0))
        known = read_prediction(file.name, file.header)
        names = [*few_step.header_names(file.header.metadata), (FILE_NAME, file.name)]
    prediction = known.prediction if known else spec.schedule.prediction
    notes: tuple[str, ...] = (f"its UNet is that of {file.path.name}",)
    if known is None and few_step.predicts_x_0(file.name):
        prediction = "sample"
        notes += (f"its UNet predicts x_0, according to {FILE_NAME}",)
    schedule = replace(spec.schedule, prediction=prediction)
    changed = replace(spec, name=file.name, unet=unet, schedule=schedule, few_step=None)
    changed, note = few_step.with_few_steps(changed, names)
    return changed, notes + ((note,) if note else ())

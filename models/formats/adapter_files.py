"""Recognises adapters with networks of their own: controls, IP-Adapters, image encoders. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from models.adapter_specs import ControlNetSpec, IPAdapterSpec, T2IAdapterSpec, VisionSpec
from models.errors import CheckpointError
from models.formats import control_files, ip_files, t2i_files
from models.formats.config_files import Config, read_json
from models.formats.diffusers_read import translated
from models.formats.ldm import Shapes
from models.formats.safetensors import Header
from models.formats.single_file import read_header
from models.formats.structure import checked_structure

Spec = ControlNetSpec | T2IAdapterSpec | IPAdapterSpec | VisionSpec
Role = Literal["control", "reference adapter", "image encoder"]
OPTIONS: dict[Role, str] = {  # of the command line, for each role
    "control": "--controlnet",
    "reference adapter": "--reference-adapter",
    "image encoder": "--image-encoder",
}
IMAGE_ENCODER, IP_ADAPTER = "a CLIP image encoder", "an IP-Adapter"
IP_KINDS = {"plain": IP_ADAPTER, "plus": "an IP-Adapter Plus", "full": "an IP-Adapter Full Face"}
CONTROL_KINDS = {
    control_files.CONTROL: control_files.CONTROL_NET,
    control_files.UNION: control_files.UNION_NET,
    t2i_files.CLASS: control_files.T2I_ADAPTER,
}
ENCODER_CLASS, ENCODER_TYPE = "CLIPVisionModelWithProjection", "clip_vision_model"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter at a path.

    kind: with its article. spec: None where the file does not show it. header: of a single file. problem: why
    it cannot be used; "" if it can.
    """

    path: Path
    role: Role
    kind: str
    spec: Spec | None = None
    header: Header | None = None
    problem: str = ""

    @property
    def usage(self) -> str:
        """What it is, and which option it is for."""
        return f"{self.path} is {self.kind}, which is added to a model with {OPTIONS[self.role]}"


def recognise(path: Path, allow_pickle: bool = False) -> AdapterFile | None:
    """The adapter in a folder of diffusers or `transformers`, or in a single file; None for anything else.

    Raises CheckpointError for a file that cannot be read.
    """
    return in_folder(path) if path.is_dir() else in_file(path, read_header(path, allow_pickle))


def in_folder(path: Path) -> AdapterFile | None:
    """The adapter that the configuration in a folder describes."""
    file = path / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    name = config.get("_class_name")
    if isinstance(name, str) and name in CONTROL_KINDS:
        reader: Callable[[Config], Any] = control_files.spec_of_config
        reader = t2i_files.spec_of_config if name == t2i_files.CLASS else reader
        found = AdapterFile(path, "control", CONTROL_KINDS[name].name)
        return with_spec(found, lambda: translated(file, reader, config))
    classes = config.get("architectures")
    if config.get("model_type") == ENCODER_TYPE or classes == [ENCODER_CLASS]:
        found = AdapterFile(path, "image encoder", IMAGE_ENCODER)
        return with_spec(found, lambda: translated(file, ip_files.vision_spec, config))
    return None


def in_file(path: Path, header: Header) -> AdapterFile | None:
    """The adapter that the tensors of a file form."""
    shapes: Shapes = header.shapes
    if kind := control_files.kind_of(shapes):
        found = AdapterFile(path, "control", kind.name, header=header, problem=kind.refused)
        if kind.refused or kind.derived:
            return found
        return with_spec(found, lambda: control_spec(kind, shapes, path))
    if ip_files.is_ip_adapter(shapes):
        found = AdapterFile(path, "reference adapter", IP_ADAPTER, header=header)
        if reason := ip_files.refusal(shapes):
            return replace(found, problem=reason)
        found = with_spec(found, lambda: ip_files.spec_of_tensors(shapes))
        spec = found.spec
        return replace(found, kind=IP_KINDS[spec.kind]) if isinstance(spec, IPAdapterSpec) else found
    prefix = ip_files.VISION_PREFIX
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items()}
    if prefix + ip_files.CLASS_EMBEDDING in shapes:
        found = AdapterFile(path, "image encoder", IMAGE_ENCODER, header=header)
        return with_spec(found, lambda: ip_files.vision_spec_of_tensors(own))
    return None


def control_spec(kind: control_files.ControlKind, shapes: Shapes, path: Path) -> Spec:
    if kind == control_files.T2I_ADAPTER:
        names = t2i_files.native_names(shapes)
        return t2i_files.spec_of_tensors({native: shapes[key] for native, key in names.items()})
    prefix = control_files.PREFIX
    own = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    return control_files.spec_of_tensors(own or shapes, path, None)


def with_spec(found: AdapterFile, read: Callable[[], Spec]) -> AdapterFile:
    """The adapter with its spec, or with the reason why it has none."""
    try:
        with checked_structure("it"):
            return replace(found, spec=read())
    except CheckpointError as error:
        return replace(found, problem=str(error))

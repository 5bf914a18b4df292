"""Units of A1111's ControlNet extension as clients send them: read, checked, and described in infotexts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image
from pydantic import AliasChoices, Field, ValidationError

from models.spec import ControlOption, ModelSpec
from service.api.a1111.checks import CONTROLNET, NO_MODEL, unit_is_off
from service.api.a1111.controlnet_modules import (
    CROP,
    MODULES,
    NONE,
    REFERENCE_MODULES,
    RESIZE_MODES,
    RESOLUTION,
    RESOLUTION_SLIDER,
    Module,
    find_module,
    unchanged,
)
from service.api.a1111.names import plain_names
from service.api.a1111.schemas import Body
from service.engine.job import ControlMode
from service.errors import InvalidRequest
from service.requests import images
from service.requests.checks import require
from service.requests.control_schemas import MAX_SCALE
from service.requests.resolved_request import Parameters
from service.requests.validation_errors import explain

PREFIX = "alwayson_scripts.controlnet.args"
MODES: Mapping[str | int, ControlMode] = {
    **dict.fromkeys(("Balanced", 0), "balanced"),
    **dict.fromkeys(("My prompt is more important", 1), "prompt"),
    **dict.fromkeys(("ControlNet is more important", 2), "control"),
}
MODE_NAMES = {mode: name for name, mode in MODES.items() if isinstance(name, str)}
BOTH_PASSES = (None, "", "Both", "HiResFixOption.BOTH", 0)


def aliased(*names: str) -> Any:
    return Field(default=None, validation_alias=AliasChoices(*names))


class Unit(Body):
    """A unit as clients send it; every field may be null, unknown ones are ignored with a warning."""

    image: Annotated[Any, aliased("image", "input_image")]
    mask: Annotated[Any, aliased("mask", "mask_image")]
    module: str | None = None
    model: str | None = None
    weight: Annotated[float | None, Field(ge=0, le=MAX_SCALE)] = None
    resize_mode: str | int | None = None
    processor_res: float | None = None
    threshold_a: float | None = None
    threshold_b: float | None = None
    guidance_start: Annotated[float | None, Field(ge=0, le=1)] = None
    guidance_end: Annotated[
        float | None, Field(ge=0, le=1, validation_alias=AliasChoices("guidance_end", "guidance"))
    ] = None
    control_mode: str | int | None = None
    pixel_perfect: bool | None = None
    save_detected_map: bool | None = None
    hr_option: str | int | None = None
    advanced_weighting: Any = None
    effective_region_mask: Any = None
    inpaint_crop_input_image: bool | None = None
    union_control_type: str | None = None


def field_names() -> set[str]:
    """Every name by which clients send a field of a unit."""
    names = {"enabled", *Unit.model_fields}
    for field in Unit.model_fields.values():
        if isinstance(field.validation_alias, AliasChoices):
            names |= set(map(str, field.validation_alias.choices))
    return names


FIELDS = field_names()


@dataclass(frozen=True)
class ReadUnit:
    """A checked unit. number: its index among the units of the request, for messages.

    option: the control, None for a reference adapter; sources: its images, none where it takes img2img's own.
    """

    number: int
    unit: Unit
    name: str
    option: ControlOption | None
    module: Module
    sources: tuple[Image.Image, ...]

    @property
    def field(self) -> str:
        return f"{PREFIX}.{self.number}"

    @property
    def resize_mode(self) -> str:
        return RESIZE_MODES[coalesced(self.unit.resize_mode, CROP)]

    @property
    def mode(self) -> ControlMode:
        return MODES[coalesced(self.unit.control_mode, 0)]

    @property
    def window(self) -> dict[str, float]:
        start, end = self.unit.guidance_start, self.unit.guidance_end
        return {"start": coalesced(start, 0.0), "end": coalesced(end, 1.0)}

    @property
    def scale(self) -> float:
        return float(coalesced(self.unit.weight, 1.0))


def coalesced(value: Any, default: Any) -> Any:
    return default if value is None else value


def is_on(value: Any) -> bool:
    """Whether an argument of the script is a unit that is enabled and has something to work with."""
    if not isinstance(value, dict) or unit_is_off(value):
        return False
    return any(value.get(name) not in NO_MODEL for name in ("model", "module"))


def units_in(scripts: Mapping[str, Any] | None) -> list[Any]:
    """The arguments of the script; [] without it. Raises InvalidRequest if they are no list."""
    for name, script in (scripts or {}).items():
        if name.lower() == CONTROLNET:
            arguments = script.get("args") if isinstance(script, dict) else script
            require([(PREFIX, isinstance(arguments or [], list), "must be a list of units")])
            return list(arguments or [])
    return []


def ignored_fields(scripts: Mapping[str, Any] | None) -> list[str]:
    """The fields of units that are switched on, and that no unit has here."""
    on = [(number, unit) for number, unit in enumerate(units_in(scripts)) if is_on(unit)]
    return [f"{PREFIX}.{number}.{name}" for number, unit in on for name in unit if name not in FIELDS]


def read_units(scripts: Mapping[str, Any] | None, spec: ModelSpec, max_pixels: int) -> list[ReadUnit]:
    """The units that are switched on. Slow, because it decodes images. Raises InvalidRequest."""
    found = []
    for number, value in enumerate(units_in(scripts)):
        if not is_on(value):
            continue
        try:
            unit = Unit.model_validate(value)
        except ValidationError as error:
            raise explain(error.errors()).within(f"{PREFIX}.{number}") from None
        found.append(read_unit(number, unit, spec, max_pixels))
    return found


def read_unit(number: int, unit: Unit, spec: ModelSpec, max_pixels: int) -> ReadUnit:
    field = f"{PREFIX}.{number}"
    name = find_name(unit.model, spec)
    known = ", ".join(names_of(spec)) or "none"
    require(
        [
            (
                f"{field}.model",
                name is not None,
                f"must be one of the models of /controlnet/model_list: {known}",
            )
        ]
    )
    assert name is not None
    option = next((option for option in spec.controls if option.name == name), None)
    module_name = (unit.module or NONE).strip()
    if option is None and REFERENCE_MODULES.fullmatch(module_name.lower()):
        module_name = NONE
    module = find_module(module_name)
    check_unit(field, unit, option, module)
    assert module is not None
    sources = tuple(read_sources(unit.image, f"{field}.image", max_pixels))
    require([(f"{field}.image", option is None or len(sources) <= 1, "must be one image for a ControlNet")])
    return ReadUnit(number, unit, name, option, module, sources)


def check_unit(field: str, unit: Unit, option: ControlOption | None, module: Module | None) -> None:
    """Refuse fields that would change the image but are not supported. Raises InvalidRequest."""
    start, end = coalesced(unit.guidance_start, 0.0), coalesced(unit.guidance_end, 1.0)
    modes = [str(mode) for mode in MODES]
    resize_modes = [str(mode) for mode in RESIZE_MODES]
    require(
        (
            (
                f"{field}.module",
                module is not None,
                "must be one of /controlnet/module_list: others are trained networks; send their result, "
                "with module none",
            ),
            (f"{field}.guidance_start", start < end, "must be less than guidance_end"),
            (
                f"{field}.control_mode",
                coalesced(unit.control_mode, 0) in MODES,
                f"must be one of {', '.join(modes)}",
            ),
            (
                f"{field}.resize_mode",
                coalesced(unit.resize_mode, CROP) in RESIZE_MODES,
                f"must be one of {', '.join(resize_modes)}",
            ),
            (
                f"{field}.advanced_weighting",
                not unit.advanced_weighting,
                "is not supported; it must be empty",
            ),
            (
                f"{field}.effective_region_mask",
                not unit.effective_region_mask,
                "is not supported; it must be empty",
            ),
            (f"{field}.hr_option", unit.hr_option in BOTH_PASSES, "is not supported; it must be Both"),
            (
                f"{field}.inpaint_crop_input_image",
                unit.inpaint_crop_input_image is not False,
                "is not supported; it must be true",
            ),
            (f"{field}.mask", not has_mask(unit), "is not supported; use img2img with a mask"),
            (
                f"{field}.module",
                option is not None or module is None or module.run is unchanged,
                "must be none or ip-adapter for a reference adapter",
            ),
        )
    )


def has_mask(unit: Unit) -> bool:
    image = unit.image
    inner = image.get("mask") if isinstance(image, dict) else None
    paired = image[1] if isinstance(image, list) and len(image) == 2 and isinstance(image[1], str) else None
    return bool(unit.mask or inner or paired)


def read_sources(value: Any, param: str, max_pixels: int) -> Iterator[Image.Image]:
    """The images of a unit: base64, {"image", "mask"}, [image, mask], or a list of the former two.

    Raises InvalidRequest.
    """
    if value in (None, "", [], {}):
        return
    if isinstance(value, dict):
        value = value.get("image")
    if isinstance(value, str):
        yield images.read_image(value, param, max_pixels)
    elif isinstance(value, list):
        entries = value[:1] if len(value) == 2 and all(isinstance(entry, str) for entry in value) else value
        for entry in entries:
            require([(param, isinstance(entry, str | dict), "must be an image in base64")])
            yield from read_sources(entry, param, max_pixels)
    else:
        raise InvalidRequest(f"{param} must be an image in base64", param=param)


def names_of(spec: ModelSpec) -> list[str]:
    """The names of what units can use with a model."""
    return [*(option.name for option in spec.controls), *spec.reference_adapters]


def find_name(model: str | None, spec: ModelSpec) -> str | None:
    """The control or reference adapter that a unit names, as NAME, NAME [hash] or NAME.safetensors."""
    if model in NO_MODEL or model is None:
        return None
    names = names_of(spec)
    return next((name for name in plain_names(model) if name in names), None)


def infotext_lines(scripts: Mapping[str, Any] | None, parameters: Parameters) -> dict[str, str]:
    """The units of a request as the extension writes them into an image's parameters."""
    used = [control.model for control in parameters.controls or ()]
    used += [reference.adapter for reference in parameters.reference_images or ()]
    lines = {}
    for number, value in enumerate(units_in(scripts) if used else ()):
        if is_on(value):
            unit = Unit.model_validate(value)
            names = [name for name in plain_names(unit.model or "") if name in used]
            lines[f"ControlNet {number}"] = described(unit, *names[:1])
    return lines


def described(unit: Unit, name: str = "") -> str:
    module = find_module(unit.module or NONE) or MODULES[NONE]
    a, b = module.thresholds(unit.threshold_a, unit.threshold_b)
    resolution = int(RESOLUTION_SLIDER.read(unit.processor_res)) if module.resizes else RESOLUTION
    values = {
        "Module": (unit.module or NONE).strip().lower(),
        "Model": name,
        "Weight": float(coalesced(unit.weight, 1.0)),
        "Resize Mode": RESIZE_MODES[coalesced(unit.resize_mode, CROP)],
        "Processor Res": resolution,
        "Threshold A": a if a >= 0 else None,
        "Threshold B": b if b >= 0 else None,
        "Guidance Start": float(coalesced(unit.guidance_start, 0.0)),
        "Guidance End": float(coalesced(unit.guidance_end, 1.0)),
        "Pixel Perfect": bool(unit.pixel_perfect),
        "Control Mode": MODE_NAMES[MODES[coalesced(unit.control_mode, 0)]],
    }
    shown = {key: f"{value:g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key}: {value}" for key, value in shown.items() if value is not None)

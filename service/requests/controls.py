"""From the fields `controls` and `reference_images` to what a job takes: checked, sized and preprocessed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from models.spec import NEIGHBOURS, ControlOption, ModelSpec
from service.engine.job import JobControl, JobReference
from service.requests import images
from service.requests.checks import require, shorten
from service.requests.control_schemas import (
    ControlInput,
    ControlSettings,
    PreprocessRequest,
    ReferenceInput,
    ReferenceSettings,
    ThresholdFields,
)
from service.requests.preprocessing import HIGH, LOW, Preprocessor, Thresholds, preprocess
from service.requests.resolved_request import ResolvedRequest, with_inputs, with_parameters
from service.requests.schemas import InpaintRequest, SceneRequest
from service.settings import Settings

SAME_PROPORTIONS = 0.01  # largest relative difference of proportions that is no reason for a warning
CROPPED = "{}.image is {}x{}; it was scaled to cover {}x{} and cropped"


def with_controls(
    resolved: ResolvedRequest, request: SceneRequest, spec: ModelSpec, settings: Settings
) -> ResolvedRequest:
    """Add the controls and reference images. Raises InvalidRequest."""
    controls, references = request.controls or [], request.reference_images or []
    warnings: list[str] = []
    job_controls = []
    for index, control in enumerate(controls):
        field = f"controls.{index}"
        option = check_control(control, field, spec, resolved)
        image = read_control(control, field, request, settings)
        if image and not has_proportions(image, resolved.width, resolved.height):
            size = (*image.size, resolved.width, resolved.height)
            warnings.append(CROPPED.format(field, *size))
        job_controls.append(job_control(control, option, control_pixels(image, resolved), resolved))
    job_references = [
        job_reference(reference, f"reference_images.{index}", spec, settings)
        for index, reference in enumerate(references)
    ]
    if not controls and not references:
        return resolved
    resolved = with_parameters(
        resolved,
        controls=[ControlSettings(**one.model_dump(exclude={"image"})) for one in controls] or None,
        reference_images=[ReferenceSettings(**one.model_dump(exclude={"image"})) for one in references]
        or None,
    )
    resolved = with_inputs(resolved, controls=tuple(job_controls), references=tuple(job_references))
    return resolved.with_warnings(warnings)


def check_control(
    control: ControlInput, field: str, spec: ModelSpec, resolved: ResolvedRequest
) -> ControlOption:
    """Check a control's name, type, window and thresholds; returns what it is. Raises InvalidRequest."""
    known = ", ".join(option.name for option in spec.controls) or "none"
    unknown = f"is {shorten(control.model)!r}, which this model does not have; available: {known}"
    option = find(control.model, spec.controls)
    require([(f"{field}.model", option is not None, unknown)])
    assert option is not None
    types = ", ".join(option.types)
    require(
        (
            (
                f"{field}.type",
                control.type in option.types or not option.types,
                f"must be one of {types} for this control",
            ),
            (
                f"{field}.type",
                control.type is None or bool(option.types),
                "cannot be set: this control has one type",
            ),
            (
                f"{field}.model",
                bool(resolved.inputs.mask) or not option.needs_mask(control.type),
                "is an inpainting control, which needs a mask: use /inpaint",
            ),
            window_rule(field, control.start, control.end),
            *threshold_rules(f"{field}.", control, control.preprocess),
        )
    )
    return option


def find(name: str, options: Sequence[ControlOption]) -> ControlOption | None:
    return next((option for option in options if option.name == name), None)


def window_rule(field: str, start: float, end: float) -> tuple[str, bool, str]:
    return f"{field}.start", start < end, f"must be less than end, {end:g}"


def threshold_rules(
    prefix: str, thresholds: ThresholdFields, method: Preprocessor
) -> list[tuple[str, bool, str]]:
    """The rules of low and high: only canny has them, and low is not above high."""
    low, high, is_canny = thresholds.low, thresholds.high, method == "canny"
    return [
        (f"{prefix}low", is_canny or low == LOW, "can be set only if preprocess is canny"),
        (f"{prefix}high", is_canny or high == HIGH, "can be set only if preprocess is canny"),
        (f"{prefix}low", low <= high, f"must be at most high, {high}"),
    ]


def read_control(
    control: ControlInput, field: str, request: SceneRequest, settings: Settings
) -> Image.Image | None:
    """The control's image; None where it is that of an inpainting request."""
    if control.image is None and isinstance(request, InpaintRequest):
        return None
    require([(f"{field}.image", control.image is not None, "is required")])
    assert control.image is not None
    return images.read_image(control.image, f"{field}.image", settings.max_input_pixels)


def has_proportions(image: Image.Image, width: int, height: int) -> bool:
    return abs(image.width * height / (image.height * width) - 1) <= SAME_PROPORTIONS


def control_pixels(image: Image.Image | None, resolved: ResolvedRequest) -> Image.Image:
    """The image at the size of the part of the canvas that is used; None: the job's own input image."""
    canvas, size = (resolved.canvas_width, resolved.canvas_height), (resolved.width, resolved.height)
    if image is None:
        return Image.frombytes("RGB", canvas, resolved.inputs.image)
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    paste = resolved.inputs.paste
    if paste and paste.region:  # the canvas is a region of the image
        image = image.crop(paste.region).resize(canvas, Image.Resampling.LANCZOS)
    return image


def job_control(
    control: ControlInput, option: ControlOption, image: Image.Image, resolved: ResolvedRequest
) -> JobControl:
    """The control with its image preprocessed, on the job's canvas."""
    thresholds = Thresholds(control.low, control.high)
    pixels = Image.fromarray(preprocess(np.asarray(image), control.preprocess, thresholds))
    canvas = images.extend(pixels, resolved.canvas_width, resolved.canvas_height)
    return JobControl(
        control.model,
        canvas,
        control.scale,
        control.start,
        control.end,
        control.mode,
        type=option.types.index(control.type) if control.type else 0,
        masked=option.needs_mask(control.type),
    )


def job_reference(reference: ReferenceInput, field: str, spec: ModelSpec, settings: Settings) -> JobReference:
    """The reference image as sent: only its adapter knows the size that it needs. Raises InvalidRequest."""
    known = ", ".join(spec.reference_adapters) or "none"
    unknown = f"is {shorten(reference.adapter)!r}, which this model does not have; available: {known}"
    require(
        (
            (f"{field}.adapter", reference.adapter in spec.reference_adapters, unknown),
            window_rule(field, reference.start, reference.end),
            *neighbour_rules(field, reference),
        )
    )
    image = images.read_image(reference.image, f"{field}.image", settings.max_input_pixels)
    return JobReference(
        reference.adapter, image.tobytes(), *image.size, reference.scale, reference.start, reference.end
    )


def neighbour_rules(field: str, reference: ReferenceInput) -> list[tuple[str, bool, str]]:
    """A neighbour is a part of the context: it has no scale and no window."""
    is_neighbour = reference.adapter == NEIGHBOURS
    values = {"scale": (reference.scale, 1), "start": (reference.start, 0), "end": (reference.end, 1)}
    return [
        (f"{field}.{name}", not is_neighbour or value == default, f"must be {default} for {NEIGHBOURS}")
        for name, (value, default) in values.items()
    ]


def preprocessed(request: PreprocessRequest, settings: Settings) -> Image.Image:
    """The control image of POST /preprocess. Raises InvalidRequest."""
    require(threshold_rules("", request, request.preprocess))
    image = images.read_image(request.image, "image", settings.max_input_pixels)
    thresholds = Thresholds(request.low, request.high)
    return Image.fromarray(preprocess(np.asarray(image), request.preprocess, thresholds))

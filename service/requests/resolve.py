"""Resolves a request with the model's spec to a ResolvedRequest, or raises an error that names the field."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from pydantic import ValidationError

from models.spec import ALL_TASKS, ModelSpec
from models.tiles import cut
from service.errors import InvalidRequest, NotFound
from service.requests import checks, images, labels
from service.requests.checks import require
from service.requests.controls import with_controls
from service.requests.defaults import coalesce, round_up, with_defaults
from service.requests.images import Format
from service.requests.phases import with_feature_cache, with_hires, with_refiner
from service.requests.resolve_inpainting import inpaint
from service.requests.resolved_request import (
    NO_PREVIEWS,
    Previews,
    ResolvedRequest,
    with_inputs,
    with_parameters,
)
from service.requests.schemas import (
    AnyRequest,
    GenerateRequest,
    ImageRequest,
    InpaintRequest,
    SceneRequest,
    UpscaleRequest,
)
from service.requests.validation_errors import explain
from service.settings import Settings

Request = TypeVar("Request", bound=ImageRequest)

DEFAULT_STRENGTH = 0.75  # of image-to-image
RESIZED = "init_image is {}x{} and was resized to {}x{}, the nearest size that the model supports"

TASKS_OF: dict[type[ImageRequest], tuple[str, ...]] = {  # the model must support one of them
    GenerateRequest: tuple(task for task in ALL_TASKS if task not in ("inpainting", "upscaling")),
    InpaintRequest: ("inpainting",),
    UpscaleRequest: ("upscaling",),
}


class OutputFormat(NamedTuple):
    """A file format, and the field or header that selected it."""

    format: Format
    field: str


def resolve(
    request: AnyRequest,
    specs: Mapping[str, ModelSpec],
    settings: Settings,
    output: OutputFormat | None = None,
    previews: Previews = NO_PREVIEWS,
    soft_mask: Image.Image | None = None,
) -> ResolvedRequest:
    """The request with all defaults filled in and all checks passed. Slow, because it decodes images.

    output: a file format that takes precedence over the request's own. soft_mask: a mask (L) in place of that
    of an inpainting request; the result fades into the image where it is grey. Raises NotFound for the model,
    InvalidRequest for everything else.
    """
    tasks = TASKS_OF[type(request)]
    spec = find_model(request.model, specs, tasks)
    checks.check_task(spec, tasks)
    if isinstance(request, UpscaleRequest):
        resolved = upscale(request, spec, settings)
    else:
        checks.check_conditions(request, spec)
        if isinstance(request, InpaintRequest):
            resolved = inpaint(request, spec, settings, soft_mask)
        elif request.init_image is not None:
            resolved = image_to_image(request, request.init_image, spec, settings)
        else:
            resolved = text_to_image(request, spec, settings)
        resolved = with_layout(resolved, request, spec, settings)
        resolved = with_controls(resolved, request, spec, settings)
        resolved = with_hires(resolved, request, specs, settings)
        resolved = with_refiner(resolved, request, specs)
        resolved = with_feature_cache(resolved, specs)
    checks.check_task(spec, (resolved.task,))
    if request.guidance_scale is None and not is_guided(resolved, spec):  # the same image with half the rows
        resolved = with_parameters(resolved, guidance_scale=1.0)
    kind, field = output or OutputFormat(request.output_format or "png", "output_format")
    checks.check_format(resolved.width, resolved.height, kind, field)
    has_provenance = settings.provenance != "none"
    return replace(resolved, format=kind, previews=previews, has_provenance=has_provenance)


def find_model(name: str | None, specs: Mapping[str, ModelSpec], tasks: Collection[str]) -> ModelSpec:
    """The model with this name, or without a name the first one that supports a task. Raises NotFound.

    The name is only looked up; it never becomes a path.
    """
    supporting = [key for key, spec in specs.items() if checks.supports_any(spec, tasks)]
    name = coalesce(name, next(iter([*supporting, *specs]), ""))
    if not specs:
        raise NotFound("there is no model: none was found in the folders of models", param="model")
    if name not in specs:
        raise NotFound(f"model does not exist; expected one of {', '.join(specs)}", param="model")
    return specs[name]


def text_to_image(request: GenerateRequest, spec: ModelSpec, settings: Settings) -> ResolvedRequest:
    """Resolve a request that starts from noise."""
    if request.strength is not None:
        raise InvalidRequest("strength requires init_image", param="strength")
    size = coalesce(request.width, spec.defaults.width), coalesce(request.height, spec.defaults.height)
    resolved = with_defaults(request, spec, size, size)
    checks.check_limits(resolved, spec, settings)
    return resolved


def image_to_image(
    request: GenerateRequest, source: images.ImageSource, spec: ModelSpec, settings: Settings
) -> ResolvedRequest:
    """Resolve a request that starts from init_image, resized to the requested or the nearest size."""
    image = images.read_image(source, "init_image", settings.max_input_pixels)
    size = fitting_size(image.size, request, spec.size_multiple)
    strength = coalesce(request.strength, 1.0 if spec.edits else DEFAULT_STRENGTH)
    resolved = with_defaults(request, spec, size, size, strength)
    sized_by_image = request.width is None and request.height is None
    checks.check_limits(resolved, spec, settings, "init_image" if sized_by_image else "width")
    requested = coalesce(request.width, image.width), coalesce(request.height, image.height)
    warnings = () if requested == size else (RESIZED.format(*image.size, *size),)
    pixels = image.resize(size, Image.Resampling.LANCZOS).tobytes()
    return with_inputs(replace(resolved, warnings=resolved.warnings + warnings), image=pixels)


def fitting_size(size: tuple[int, int], request: GenerateRequest, multiple: int) -> tuple[int, int]:
    """(width, height) to resize an input image of `size` to. A side that is not requested keeps the
    proportions."""

    def nearest(side: float) -> int:
        return max(1, round(side / multiple)) * multiple

    width, height = size
    return (
        coalesce(request.width, nearest(width * coalesce(request.height, height) / height)),
        coalesce(request.height, nearest(height * coalesce(request.width, width) / width)),
    )


def upscale(request: UpscaleRequest, spec: ModelSpec, settings: Settings) -> ResolvedRequest:
    """Resolve an upscaling request, on a canvas of the next larger size that the UNet supports."""
    if spec.upscaling is None or spec.unet is None:
        raise ValueError(f"{spec.name} is no upscaling model")
    image = images.read_image(request.image, "image", settings.max_input_pixels)
    model_scale, scale = spec.autoencoder.factor, coalesce(request.scale, spec.autoencoder.factor)
    width, height = (round_up(side, spec.unet.factor) for side in image.size)
    size = scale * image.width, scale * image.height
    canvas = model_scale * width, model_scale * height
    resolved = replace(with_defaults(request, spec, size, canvas), model_scale=model_scale)
    checks.check_limits(resolved, spec, settings, "image")
    noise_level = coalesce(request.noise_level, spec.defaults.noise_level)
    max_noise = spec.upscaling.max_noise_level
    require(
        (
            ("scale", scale <= model_scale, f"must be at most {model_scale} for this model"),
            ("noise_level", noise_level <= max_noise, f"must be at most {max_noise} for this model"),
        )
    )
    resolved = with_parameters(resolved, scale=scale, noise_level=noise_level)
    resolved = replace(resolved, tiles=cut(height, width, spec.tile))
    return with_inputs(resolved, image=images.extend(image, width, height))


def with_layout(
    resolved: ResolvedRequest, request: SceneRequest, spec: ModelSpec, settings: Settings
) -> ResolvedRequest:
    """Add the layout of boxes or segmentation. Without a prompt, the names of its labels become the prompt.

    The layout covers the client's image; the rest of a larger canvas has no labels.
    """
    if request.boxes is not None and not spec.layout_channels:
        return with_inputs(resolved, boxes=labels.to_numbered_boxes(request.boxes, spec))
    cell, (width, height) = spec.label_cell, (resolved.width, resolved.height)
    rows, columns = round_up(height, cell) // cell, round_up(width, cell) // cell
    if request.boxes is not None:
        regions = labels.from_boxes(request.boxes, spec, rows, columns)
    elif request.segmentation is not None:
        image = images.read_image(request.segmentation, "segmentation", settings.max_input_pixels)
        fits = not spec.labels_pixels or image.size == (width, height)
        require([("segmentation", fits, f"must have the size of the generated image, {width}x{height}")])
        regions = labels.from_colours(image, spec, rows, columns, "segmentation")
    else:
        return resolved
    below = round_up(resolved.canvas_height, cell) // cell - rows
    beside = round_up(resolved.canvas_width, cell) // cell - columns
    if not resolved.prompt and spec.reads_prompts:
        resolved = with_parameters(resolved, prompt=labels.to_prompt(regions, spec) or None)
    return with_inputs(resolved, regions=np.pad(regions, ((0, below), (0, beside))).tobytes())


def is_guided(resolved: ResolvedRequest, spec: ModelSpec) -> bool:
    """Whether the conditional and the unconditional prediction can differ."""
    inputs, prompt, negative = resolved.inputs, resolved.prompt, resolved.negative_prompt
    conditioned = inputs.regions or inputs.boxes or resolved.parameters.class_label is not None
    one_sided = {option.name for option in spec.controls if option.conditional_only}
    guided_by_image = inputs.references or any(
        control.mode == "control" or control.name in one_sided for control in inputs.controls
    )
    return bool(
        conditioned
        or spec.embeds_guidance
        or spec.edits
        or guided_by_image
        or (spec.zero_null and not negative)
        or prompt != negative
    )


def build_request(kind: type[Request], fields: Mapping[str, Any]) -> Request:
    """The request with the fields that are not None. Raises InvalidRequest as the native API does."""
    try:
        return kind.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise explain(error.errors()) from None

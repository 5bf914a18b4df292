"""Resolves a request with the model's spec to a ResolvedRequest, or raises an error that names the field."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from pydantic import ValidationError

from models.conditioning import prompts
from models.sampling.guidance import DEFAULT_IMAGE_GUIDANCE
from models.sampling.samplers import default_eta, default_spacing
from models.spec import ALL_TASKS, ModelSpec
from models.tiles import cut
from service.engine.job import LatentFill
from service.errors import InvalidRequest, NotFound
from service.requests import checks, images, labels
from service.requests.checks import require, shorten
from service.requests.controls import with_controls
from service.requests.images import Format
from service.requests.inpainting import MaskedImage, Paste, blurred, extended, region_of
from service.requests.phases import with_hires, with_refiner
from service.requests.resolved_request import (
    NO_PREVIEWS,
    Parameters,
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
    VariationSeed,
)
from service.requests.validation_errors import explain
from service.settings import Settings

Request = TypeVar("Request", bound=ImageRequest)
Value = TypeVar("Value")

DEFAULT_STRENGTH = 0.75  # of image-to-image
LATENT_FILL: dict[str, LatentFill] = {"noise": "noise", "empty": "zeros"}  # of `fill`
MAX_RANDOM_SEED = 2**53 - 1  # the largest integer that every JSON client can represent
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
        resolved = with_hires(resolved, request, spec, settings)
        resolved = with_refiner(resolved, request, specs)
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


def inpaint(
    request: InpaintRequest, spec: ModelSpec, settings: Settings, soft_mask: Image.Image | None = None
) -> ResolvedRequest:
    """Resolve an inpainting request, on a canvas of the next larger size that the model supports.

    With area: masked, the canvas is a region of the image, resized to the requested or the model's size.
    """
    masked = read_masked(request, settings, soft_mask)
    size, region = masked.image.size, None
    canvas = round_up(size[0], spec.size_multiple), round_up(size[1], spec.size_multiple)
    if request.area == "masked":
        canvas = coalesce(request.width, spec.defaults.width), coalesce(request.height, spec.defaults.height)
    resolved = with_defaults(request, spec, size, canvas, coalesce(request.strength, 1.0))
    sized_by_image = "extend" if request.extend else "image"
    checks.check_limits(resolved, spec, settings, sized_by_image if request.area == "whole" else "width")
    work = masked
    if request.area == "masked":
        region = region_of(masked.mask, request.padding, *canvas)
        work = masked.cropped(region).resized(*canvas)
        resolved = replace(resolved, region=True)
        resolved = with_parameters(resolved, width=canvas[0], height=canvas[1], padding=request.padding)
    image = work.image if request.fill == "original" else work.filled()
    pasted = soft_mask is not None or request.mask_blur or request.extend or region
    return with_inputs(
        replace(resolved, latent_fill=LATENT_FILL.get(request.fill, "image")),
        image=images.extend(image, *canvas),
        mask=images.extend(work.binary_mask, *canvas),
        paste=Paste(masked, region) if pasted else None,
    )


def read_masked(
    request: InpaintRequest, settings: Settings, soft_mask: Image.Image | None = None
) -> MaskedImage:
    """The image and its mask, extended and blurred. soft_mask: see resolve(). Raises InvalidRequest."""
    image = images.read_image(request.image, "image", settings.max_input_pixels)
    left, top, right, bottom = request.extend.sides if request.extend else (0, 0, 0, 0)
    size = image.width + left + right, image.height + top + bottom
    checks.check_inpainting(request, size, settings.max_input_pixels)
    if soft_mask is not None:
        mask = soft_mask
    elif request.mask is not None:
        mask = images.read_mask(request.mask, "mask", settings.max_input_pixels)
        checks.check_mask(mask, image)
    else:
        require([("mask", size != image.size, "is required")])
        mask = Image.new("L", image.size)
    masked = MaskedImage(image, blurred(mask, request.mask_blur))
    if request.extend is None:
        return masked
    return extended(masked, request.extend.sides, request.mask_blur)


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


def with_defaults(
    request: AnyRequest,
    spec: ModelSpec,
    size: tuple[int, int],
    canvas: tuple[int, int],
    strength: float | None = None,
) -> ResolvedRequest:
    """The request with the model's defaults, still without its images and layout."""
    defaults, scene = spec.defaults, request if isinstance(request, SceneRequest) else None
    sampler = coalesce(request.sampler, defaults.sampler)
    label = (
        labels.number_of(scene.class_label, spec, "class_label")
        if scene and scene.class_label is not None
        else None
    )
    label_name = spec.labels[label] if label is not None and spec.reads_prompts else ""
    parameters = Parameters(
        model=spec.name,
        prompt=None if label is not None else request.prompt or None,
        negative_prompt=request.negative_prompt if scene else request.negative_prompt or None,
        width=size[0] if scene else None,
        height=size[1] if scene else None,
        steps=coalesce(request.steps, defaults.steps),
        guidance_scale=coalesce(request.guidance_scale, defaults.guidance_scale),
        seed=random_seed(request.n) if request.seed in (None, -1) else request.seed,
        n=request.n,
        sampler=sampler,
        eta=coalesce(request.eta, default_eta(spec, sampler)),
        strength=strength,
        class_label=label,
        spacing=coalesce(request.spacing, default_spacing(spec, sampler)),
        long_prompts=None if request.long_prompts == "cut" else request.long_prompts,
        prompt_weights=request.prompt_weights or None,
        boxes=scene.boxes if scene else None,
        loras=loras_of(request, spec) or None,
        lora_text_weights=text_weights_of(request) or None,
        **(guidance_parameters(scene) if scene else {}),
        image_guidance_scale=image_guidance_of(request, spec),
        prompt_syntax=scene.prompt_syntax if scene and scene.prompt_syntax != "plain" else None,
        decoder=scene.decoder if scene and scene.decoder != "full" else None,
        tiling=scene.tiling if scene and scene.tiling != "none" else None,
        clip_skip=scene.clip_skip if scene and scene.clip_skip != 1 else None,
        variation=variation_of(scene, request.n) if scene else None,
        **(inpainting_parameters(request) if isinstance(request, InpaintRequest) else {}),
    )
    return ResolvedRequest(
        id=uuid.uuid4().hex,
        parameters=parameters,
        width=size[0],
        height=size[1],
        canvas_width=canvas[0],
        canvas_height=canvas[1],
        format="png",
        priority=request.priority,
        embeds_guidance=spec.embeds_guidance,
        label_name=prompts.escape(label_name) if is_weighted(request) else label_name,
        warnings=tuple(
            warning
            for name, warning in zip(spec.loras, spec.lora_warnings, strict=False)
            if warning and name in (parameters.loras or {})
        ),
    )


def is_weighted(request: ImageRequest) -> bool:
    """Whether brackets in prompts are weights."""
    return request.prompt_weights or (isinstance(request, SceneRequest) and request.prompt_syntax == "a1111")


def random_seed(n: int) -> int:
    """A random seed for n images: every JSON client can represent all n seeds exactly."""
    return secrets.randbelow(MAX_RANDOM_SEED + 2 - n)


def inpainting_parameters(request: InpaintRequest) -> dict[str, Any]:
    """The parameters of inpainting that differ from their defaults."""
    return {
        "mask_blur": request.mask_blur or None,
        "area": None if request.area == "whole" else request.area,
        "fill": None if request.fill == "original" else request.fill,
        "extend": request.extend,
    }


def guidance_parameters(request: SceneRequest) -> dict[str, Any]:
    """The parameters of guidance that differ from their defaults. Raises InvalidRequest for an empty part."""
    start, end = request.guidance_start, request.guidance_end
    require([("guidance_end", start < end, f"must be greater than guidance_start, {start}")])
    return {
        "guidance_start": start or None,
        "guidance_end": None if end == 1.0 else end,
        "guidance_rescale": request.guidance_rescale or None,
    }


def image_guidance_of(request: AnyRequest, spec: ModelSpec) -> float | None:
    """The scale of guidance by the image to edit; None if none is given and the model edits no images."""
    scale = request.image_guidance_scale if isinstance(request, GenerateRequest) else None
    return DEFAULT_IMAGE_GUIDANCE if scale is None and spec.edits else scale


def variation_of(request: SceneRequest, n: int) -> VariationSeed | None:
    """The variation with its seed drawn if necessary; None if there is none or its strength is 0."""
    variation = request.variation
    if variation is None or not variation.strength:
        return None
    return variation.model_copy(update={"seed": random_seed(n)}) if variation.seed == -1 else variation


def loras_of(request: ImageRequest, spec: ModelSpec) -> dict[str, float]:
    """Name -> weight, sorted, without LoRAs that change nothing. Raises InvalidRequest for unknown names."""
    known = ", ".join(spec.loras) or "none"
    for name in request.loras:
        expected = f"contains {shorten(name)!r}, which this model does not have; available: {known}"
        require([("loras", name in spec.loras, expected)])
    for name in request.lora_text_weights:
        require(
            [
                (
                    "lora_text_weights",
                    name in request.loras,
                    f"contains {shorten(name)!r}, which is not in loras",
                )
            ]
        )
    loras, text = request.loras, request.lora_text_weights
    return {name: weight for name, weight in sorted(loras.items()) if weight or text.get(name)}


def text_weights_of(request: ImageRequest) -> dict[str, float]:
    """Name -> weight for the text encoders, sorted, of LoRAs for which it differs from the UNet's weight."""
    weights = sorted(request.lora_text_weights.items())
    return {name: weight for name, weight in weights if weight != request.loras[name]}


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


def round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def coalesce(value: Value | None, default: Value) -> Value:
    """The value, or the default if it is None; 0 is a value."""
    return default if value is None else value


def build_request(kind: type[Request], fields: Mapping[str, Any]) -> Request:
    """The request with the fields that are not None. Raises InvalidRequest as the native API does."""
    try:
        return kind.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise explain(error.errors()) from None

"""Checks of a request against the model and the limits. Each raises InvalidRequest, which names the field."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from PIL import Image

from models.conditioning import prompts
from models.conditioning.prompt_schedule import PromptError, compose
from models.sampling.samplers import (
    ETA_SAMPLERS,
    SAMPLERS,
    max_steps,
    schedule_steps,
    spacings_of,
    unet_calls,
)
from models.spec import ModelSpec
from models.tiles import MAX_WHOLE_PIXELS
from service.engine.job import MAX_SEED
from service.errors import InvalidRequest
from service.requests.extras import check_extras, reads_tokens
from service.requests.images import MAX_SIDE_OF_FORMAT, Format
from service.requests.resolved_request import ResolvedRequest
from service.requests.schemas import GenerateRequest, InpaintRequest
from service.settings import Settings

TASK_OF_CONDITION = {
    "class_label": "class-to-image",
    "boxes": "layout-to-image",
    "segmentation": "layout-to-image",
}
MAX_ERROR_CHARS = 64  # of a client's text that an error message quotes
NO_PROMPT = "is not supported by this model, which reads no prompts"
DEFAULT_PADDING = InpaintRequest.model_fields["padding"].default  # some clients send all defaults


def require(rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raise InvalidRequest for the first rule (field, whether it holds, what is expected) that fails."""
    for param, holds, expected in rules:
        if not holds:
            raise InvalidRequest(f"{param} {expected}", param=param)


def shorten(text: str) -> str:
    """A client's text as error messages quote it: short, and valid UTF-8."""
    return text.encode("utf-8", "replace").decode()[:MAX_ERROR_CHARS]


def supports_any(spec: ModelSpec, tasks: Collection[str]) -> bool:
    """Whether the model supports at least one of the tasks."""
    return any(task in spec.tasks for task in tasks)


def check_task(spec: ModelSpec, tasks: Collection[str]) -> None:
    """Check that the model supports at least one of the tasks."""
    expected = f"must support {next(iter(tasks))}; {spec.name} supports {', '.join(spec.tasks)}"
    require([("model", supports_any(spec, tasks), expected)])


def check_conditions(request: GenerateRequest | InpaintRequest, spec: ModelSpec) -> None:
    """Check that the model supports the request's conditions, and that they are complete and compatible."""
    given = [name for name in TASK_OF_CONDITION if getattr(request, name) is not None]
    inputs = " or ".join(spec.inputs) or "none"
    for name in given:
        supported = name in spec.inputs and TASK_OF_CONDITION[name] in spec.tasks
        require([(name, supported, f"is not supported by this model; supported inputs: {inputs}")])
    has_image = bool(request.controls or request.reference_images) or (
        isinstance(request, GenerateRequest) and request.init_image is not None
    )
    is_empty = isinstance(request, GenerateRequest) and request.prompt is None and not has_image
    unconditioned = not given and bool(spec.inputs) and (is_empty or not spec.reads_prompts)
    required = spec.inputs[0] if spec.inputs else "prompt"
    require(
        (
            ("prompt", spec.reads_prompts or not request.prompt, NO_PROMPT),
            (
                "class_label",
                not ("class_label" in given and request.prompt),
                "cannot be combined with prompt: the label's name is the prompt",
            ),
            ("segmentation", not {"boxes", "segmentation"} <= {*given}, "cannot be combined with boxes"),
            (required, not unconditioned or "unconditional" in spec.tasks, "is required"),
        )
    )


def check_mask(mask: Image.Image, image: Image.Image) -> None:
    """Check that the mask has the image's size and white pixels."""
    width, height = image.size
    require(
        (
            ("mask", mask.size == image.size, f"must have the size of image, {width}x{height}"),
            ("mask", mask.getbbox() is not None, "is empty: white marks the pixels to repaint"),
        )
    )


def check_inpainting(request: InpaintRequest, size: tuple[int, int], max_pixels: int) -> None:
    """Check the extended size of the image, and that width, height and layouts agree with the area."""
    (width, height), whole = size, request.area == "whole"
    result = "image with extend" if request.extend else "image"
    most = f"is too large: the image would have {width}x{height} pixels; at most {max_pixels} are allowed"
    layout = request.boxes is not None or request.segmentation is not None
    require(
        (
            ("extend", width * height <= max_pixels, most),
            ("width", not whole or request.width in (None, width), f"must be the width of {result}, {width}"),
            (
                "height",
                not whole or request.height in (None, height),
                f"must be the height of {result}, {height}",
            ),
            ("area", whole or not layout, "must be whole with boxes or segmentation"),
            ("padding", not whole or request.padding == DEFAULT_PADDING, "requires area: masked"),
        )
    )


def check_limits(
    resolved: ResolvedRequest, spec: ModelSpec, settings: Settings, size_field: str = "width"
) -> None:
    """Check the limits of the model and of this service.

    size_field: the field that decides the size, which errors about the size name.
    """
    parameters = resolved.parameters
    width, height, steps, n = resolved.canvas_width, resolved.canvas_height, parameters.steps, parameters.n
    sampler, multiple, pixels = parameters.sampler, spec.size_multiple, width * height
    max_pixels = settings.max_input_pixels if resolved.model_scale else settings.max_pixels
    step_limit, calls = max_steps(sampler, spec.schedule.visited), unet_calls(sampler, steps)
    work, counted = n * calls * pixels, "steps" if calls == steps else f"{calls} UNet calls"
    spacings = spacings_of(sampler)
    too_large = (
        f"times height must be at most {max_pixels}"
        if size_field == "width"
        else f"would be processed at {width}x{height}; width times height must be at most {max_pixels}"
    )
    too_much = (
        f"is too large: n * {counted} * width * height is {work} and must be at most {settings.max_work}"
    )
    require(
        (
            ("width", width % multiple == 0, f"must be a multiple of {multiple}"),
            ("height", height % multiple == 0, f"must be a multiple of {multiple}"),
            (size_field, pixels <= max_pixels, too_large),
            ("steps", steps <= step_limit, f"must be at most {step_limit}"),
            ("n", n <= settings.max_images, f"must be at most {settings.max_images}"),
            (costliest_field(resolved, spec, size_field), work <= settings.max_work, too_much),
            ("sampler", sampler in SAMPLERS, f"must be one of {', '.join(SAMPLERS)}"),
            (
                "eta",
                not parameters.eta or sampler in ETA_SAMPLERS,
                f"must be 0 unless the sampler is {' or '.join(ETA_SAMPLERS)}",
            ),
            (
                "spacing",
                not parameters.spacing or sampler not in SAMPLERS or parameters.spacing in spacings,
                f"must be one of {', '.join(spacings)} with {sampler}"
                if spacings
                else f"cannot be set for the sampler {sampler}",
            ),
            ("prompt", spec.reads_prompts or not resolved.prompt, NO_PROMPT),
            ("negative_prompt", spec.reads_prompts or not resolved.negative_prompt, NO_PROMPT),
            (
                "negative_prompt",
                not (spec.embeds_guidance and resolved.negative_prompt),
                "is not supported by this model, whose UNet takes the guidance scale",
            ),
            (
                "guidance_scale",
                spec.guided or parameters.guidance_scale == 1.0,
                "must be 1: this model does not support classifier-free guidance",
            ),
            (
                "tiling",
                parameters.tiling is None or pixels <= MAX_WHOLE_PIXELS,
                f"needs images of at most {MAX_WHOLE_PIXELS} pixels",
            ),
            ("seed", parameters.seed + n - 1 <= MAX_SEED, f"plus n must be at most {MAX_SEED + 1}"),
        )
    )
    check_extras(parameters.extras, spec)
    clip_skip, variation = parameters.clip_skip or 1, parameters.variation
    last_variation = variation.seed + n - 1 if variation else 0
    require(
        (
            ("clip_skip", clip_skip <= spec.max_clip_skip, f"must be at most {spec.max_clip_skip}"),
            ("variation.seed", last_variation <= MAX_SEED, f"plus n must be at most {MAX_SEED + 1}"),
        )
    )
    check_prompt_options(resolved, spec)
    if parameters.prompt_syntax == "a1111":
        check_composition(resolved, settings.max_rows)


def check_prompt_options(resolved: ResolvedRequest, spec: ModelSpec) -> None:
    """Check that the model supports prompt_weights and long_prompts, and that weights are within bounds."""
    parameters, supported = resolved.parameters, reads_tokens(spec)
    expected = "requires a model with per-token text conditioning"
    rules = [
        ("prompt_weights", supported or not parameters.prompt_weights, expected),
        ("long_prompts", supported or parameters.long_prompts is None, expected),
    ]
    if parameters.prompt_weights:
        for name, text in (("prompt", resolved.prompt), ("negative_prompt", resolved.negative_prompt)):
            rules.append((name, *has_bounded_weights(text)))
    require(rules)


def has_bounded_weights(text: str) -> tuple[bool, str]:
    """Whether the weights of a prompt are within bounds, and what is expected."""
    limit = prompts.MAX_WEIGHT
    bounded = all(abs(piece.weight) <= limit for piece in prompts.parse(text))
    return bounded, f"must have weights from {-limit:g} to {limit:g}"


def check_composition(resolved: ResolvedRequest, max_rows: int) -> None:
    """Check the parts, the versions and the weights of prompts in A1111's syntax."""
    parameters, limit = resolved.parameters, prompts.MAX_WEIGHT
    steps = schedule_steps(parameters.sampler, parameters.steps)
    try:
        composition = compose(resolved.prompt, resolved.negative_prompt, steps, steps)
    except PromptError as error:
        raise InvalidRequest(f"prompt {error}", param="prompt") from None
    parts = composition.calls[0].weights
    require(
        (
            ("prompt", len(parts) < max_rows, f"must have at most {max_rows - 1} parts joined by AND"),
            ("prompt", all(abs(weight) <= limit for weight in parts), has_bounded_weights("")[1]),
        )
    )
    for is_negative, text in zip(composition.is_negative, composition.texts, strict=True):
        require([("negative_prompt" if is_negative else "prompt", *has_bounded_weights(text))])


def costliest_field(resolved: ResolvedRequest, spec: ModelSpec, size_field: str) -> str:
    """The field that raises the cost of the request most, compared with the model's defaults."""
    defaults, parameters = spec.defaults, resolved.parameters
    factors = {
        "n": float(parameters.n),
        "steps": parameters.steps / defaults.steps,
        size_field: resolved.canvas_width * resolved.canvas_height / (defaults.width * defaults.height),
    }
    return max(factors, key=lambda name: factors[name])


def check_format(width: int, height: int, kind: Format, field: str) -> None:
    """Check that the format supports images of this size. field: the field that chose the format."""
    side, limit = max(width, height), MAX_SIDE_OF_FORMAT.get(kind)
    fits = limit is None or side <= limit
    require(
        [
            (
                field,
                fits,
                f"must be a format that supports sides of {side} pixels; {kind} supports at most {limit}",
            )
        ]
    )

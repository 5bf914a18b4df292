"""The parameters of a request, with the model's defaults for fields that were left out."""

from __future__ import annotations

import secrets
import uuid
from typing import Any, TypeVar

from models.conditioning import prompts
from models.sampling.guidance import DEFAULT_IMAGE_GUIDANCE
from models.sampling.samplers import default_eta, default_spacing
from models.spec import ModelSpec
from service.requests import labels
from service.requests.checks import require, shorten
from service.requests.resolved_request import Parameters, ResolvedRequest
from service.requests.schemas import (
    AnyRequest,
    FeatureCacheInput,
    GenerateRequest,
    ImageRequest,
    InpaintRequest,
    SceneRequest,
    VariationSeed,
)

Value = TypeVar("Value")

MAX_RANDOM_SEED = 2**53 - 1  # the largest integer that every JSON client can represent


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
        feature_cache=feature_cache_of(scene) if scene else None,
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


def feature_cache_of(request: SceneRequest) -> FeatureCacheInput | None:
    """The feature cache; None if there is none or all calls compute their features."""
    cache = request.feature_cache
    return cache if cache and cache.interval > 1 else None


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


def round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def coalesce(value: Value | None, default: Value) -> Value:
    """The value, or the default if it is None; 0 is a value."""
    return default if value is None else value

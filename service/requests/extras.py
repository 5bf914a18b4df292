"""Optional fields of requests that only some models support: a table for the checks and for GET /models."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from models.spec import ModelSpec
from service.errors import InvalidRequest


def generates(spec: ModelSpec) -> bool:
    """Whether /generate or /inpaint run the model: every model but an upscaler."""
    return spec.upscaling is None


def guides(spec: ModelSpec) -> bool:
    return generates(spec) and spec.guided and not spec.embeds_guidance


def reads_tokens(spec: ModelSpec) -> bool:
    """Whether the model is conditioned on each token of a prompt, so that tokens can have weights."""
    return spec.reads_prompts and spec.context_shape is not None and spec.context_shape[0] > 1


def inpaints(spec: ModelSpec) -> bool:
    return "inpainting" in spec.tasks


# Field -> whether a model supports values other than the field's default.
EXTRAS: Mapping[str, Callable[[ModelSpec], bool]] = {
    "prompt_syntax": lambda spec: generates(spec) and reads_tokens(spec) and not spec.edits,
    "guidance_start": guides,
    "guidance_end": guides,
    "guidance_rescale": guides,
    "image_guidance_scale": lambda spec: spec.edits,
    "hires": lambda spec: generates(spec) and not spec.edits,
    "refiner": lambda spec: generates(spec) and spec.reads_prompts and not spec.concat_channels,
    "clip_skip": lambda spec: spec.max_clip_skip > 1,
    "variation": generates,
    "feature_cache": generates,
    "tiling": generates,
    "decoder": lambda spec: spec.tiny_decoder,
    "mask_blur": inpaints,
    "area": inpaints,
    "fill": inpaints,
    "extend": inpaints,
}


def extras_of(spec: ModelSpec) -> list[str]:
    """The names of the optional fields that a model supports."""
    return [name for name, supports in EXTRAS.items() if supports(spec)]


def check_extras(used: Mapping[str, object], spec: ModelSpec) -> None:
    """Raise InvalidRequest for the first field with a value other than None that the model does not support.

    used: field of EXTRAS -> its value, None if it has no effect.
    """
    for name, value in used.items():
        if value is not None and not EXTRAS[name](spec):
            raise InvalidRequest(f"{name} is not supported by the model {spec.name}", param=name)

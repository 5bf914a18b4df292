"""A1111's answers: images, `info`, and the infotext in files."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence

from service.api.a1111 import infotext
from service.api.a1111.controlnet_units import infotext_lines
from service.api.a1111.phases import hires_lines, hires_strength
from service.api.a1111.samplers import EULER_A, SamplerChoice
from service.api.a1111.schemas import ImageToImage, Info, Processing, ProcessingResponse
from service.api.a1111.session import timestamp
from service.requests import images
from service.requests.defaults import coalesce
from service.requests.metadata import Metadata
from service.requests.resolved_request import ResolvedRequest
from service.requests.response import Answer, Result

VERSION = "ldm"
STRENGTH = 0.75  # A1111's default for img2img


def strength_of(body: Processing) -> float | None:
    """A1111's denoising strength, at most 1; None for txt2img without a second pass."""
    if (strength := hires_strength(body)) is not None:
        return strength
    return min(coalesce(body.denoising_strength, STRENGTH), 1.0) if isinstance(body, ImageToImage) else None


def encoder(body: Processing, choice: SamplerChoice) -> Callable[[Result, int], bytes]:
    """A function that makes the file of image `index` of a result, with its infotext."""

    def encode(result: Result, index: int) -> bytes:
        resolved = result.resolved
        metadata = Metadata(infotext_of(body, choice, resolved, index), resolved.digital_source)
        return images.encode(result.pixels(index), resolved.format, metadata)

    return encode


def to_response(
    body: Processing, choice: SamplerChoice, answer: Answer, more: Sequence[str] = ()
) -> ProcessingResponse:
    """A1111's response. more: files in base64 that follow the images."""
    hidden = {*(body.model_extra or {})}
    if not getattr(body, "include_init_images", None):
        hidden |= {"init_images", "mask"}
    shown = [*(base64.b64encode(file).decode() for file in answer.files), *more]
    return ProcessingResponse(
        images=shown if coalesce(body.send_images, True) else [],
        parameters=body.model_dump(mode="json", exclude=hidden),
        info=info_of(body, choice, answer).model_dump_json(),
    )


def info_of(body: Processing, choice: SamplerChoice, answer: Answer) -> Info:
    resolved, values = answer.resolved, answer.resolved.parameters
    prompt, variation = body.prompt or "", values.variation
    seeds = [values.seed_of(index) for index in range(values.n)]
    subseeds = [variation.seed + index for index in range(values.n)] if variation else seeds
    return Info(
        prompt=prompt,
        all_prompts=[prompt] * values.n,
        negative_prompt=resolved.negative_prompt,
        all_negative_prompts=[resolved.negative_prompt] * values.n,
        seed=values.seed,
        all_seeds=seeds,
        subseed=subseeds[0],
        all_subseeds=subseeds,
        subseed_strength=variation.strength if variation else 0,
        width=values.width or resolved.width,
        height=values.height or resolved.height,
        sampler_name=choice.name,
        cfg_scale=values.guidance_scale,
        steps=values.steps,
        batch_size=coalesce(body.batch_size, 1),
        sd_model_name=values.model,
        denoising_strength=strength_of(body),
        clip_skip=values.clip_skip or 1,
        infotexts=[infotext_of(body, choice, resolved, index) for index in range(values.n)],
        job_timestamp=timestamp(answer.created),
        version=VERSION,
        warnings=list(answer.warnings),
    )


def eta_of(body: Processing, choice: SamplerChoice) -> float | None:
    """eta, if the sampler uses it and it is not the sampler's default."""
    return 0.0 if choice.name == EULER_A and body.eta == 0 else choice.eta or None


def infotext_of(body: Processing, choice: SamplerChoice, resolved: ResolvedRequest, index: int) -> str:
    """The prompts and parameters of image `index`."""
    values, variation = resolved.parameters, resolved.parameters.variation
    lines = {
        "Steps": values.steps,
        "Sampler": choice.name,
        "Schedule type": choice.scheduler_label,
        "CFG scale": values.guidance_scale,
        "Image CFG scale": values.image_guidance_scale,
        "Seed": values.seed_of(index),
        "Size": f"{values.width}x{values.height}",
        "Model": values.model,
        "Variation seed": variation.seed + index if variation else None,
        "Variation seed strength": variation.strength if variation else None,
        "Denoising strength": strength_of(body),
        "Clip skip": values.clip_skip,
        "Eta": eta_of(body, choice),
        "Tiling": True if values.tiling else None,
        **hires_lines(body),
        "Refiner": values.refiner.model if values.refiner else None,
        "Refiner switch at": values.refiner.switch_at if values.refiner else None,
        **infotext_lines(body.alwayson_scripts, values),
        "Version": VERSION,
    }
    return infotext.write(body.prompt or "", resolved.negative_prompt, lines)

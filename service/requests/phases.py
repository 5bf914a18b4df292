"""Adds the phases of a run to a resolved request: the second pass and the refiner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from models.sampling.samplers import first_call, max_steps, plan
from models.sampling.schedule import Schedule
from models.spec import ModelSpec
from models.tiles import MAX_WHOLE_PIXELS
from models.upscalers import UPSCALERS
from service.engine.job import Hires
from service.errors import InvalidRequest
from service.requests.checks import NO_PROMPT, check_composition, check_prompt_options, require
from service.requests.phase_schemas import HiresInput
from service.requests.resolved_request import ResolvedRequest, with_parameters
from service.requests.schemas import GenerateRequest, SceneRequest
from service.settings import Settings

CACHED = "feature_cache was used: up to {} of {} UNet calls reused deep features; the image is less exact"
CROPPED = "hires gives {}x{}, which was reduced to {}x{}: sides are multiples of {}"


def with_refiner(
    resolved: ResolvedRequest, request: SceneRequest, specs: Mapping[str, ModelSpec]
) -> ResolvedRequest:
    """Add the refiner. Raises InvalidRequest."""
    refiner = request.refiner
    if refiner is None:
        return resolved
    if refiner.model not in specs:
        known = ", ".join(specs)
        raise InvalidRequest(f"refiner.model does not exist; expected one of {known}", param="refiner.model")
    check_refiner(resolved, specs[resolved.parameters.model], specs[refiner.model])
    calls = calls_of(resolved, specs[resolved.parameters.model])
    switch = first_call(resolved.parameters.sampler, calls, refiner.switch_at)
    none_left = f"leaves none of the {calls} UNet calls to the refiner"
    require([("refiner.switch_at", switch < calls, none_left)])
    return with_parameters(resolved, refiner=refiner)


def with_hires(
    resolved: ResolvedRequest, request: SceneRequest, specs: Mapping[str, ModelSpec], settings: Settings
) -> ResolvedRequest:
    """Add the second pass at a larger size. Raises InvalidRequest."""
    hires = request.hires if isinstance(request, GenerateRequest) else None
    if hires is None:
        return resolved
    spec = specs[resolved.parameters.model]
    models = [name for name, each in specs.items() if each.upscaling]
    check_second_pass(resolved, hires, spec, models)
    wanted = target_size(hires, (resolved.width, resolved.height))
    width, height = (side // spec.size_multiple * spec.size_multiple for side in wanted)
    parameters = resolved.parameters
    job_hires = Hires(
        width=width,
        height=height,
        steps=parameters.steps if hires.steps is None else hires.steps,
        strength=hires.strength,
        upscaler=hires.upscaler,
        prompt=resolved.prompt if hires.prompt is None else hires.prompt,
        negative_prompt=(
            resolved.negative_prompt if hires.negative_prompt is None else hires.negative_prompt
        ),
        model=hires.upscaler in models,
    )
    upscaler = specs[hires.upscaler] if job_hires.model else None
    first, size = resolved, "scale" if hires.width is None and hires.height is None else "width"
    resolved = replace(resolved, hires=job_hires, width=width, height=height)
    resolved = with_parameters(resolved, hires=hires)
    check_size(resolved, first, f"hires.{size}", spec, upscaler, settings)
    check_prompts(first, job_hires, spec, settings)
    warning = CROPPED.format(*wanted, width, height, spec.size_multiple)
    return resolved if wanted == (width, height) else resolved.with_warnings([warning])


def with_feature_cache(resolved: ResolvedRequest, specs: Mapping[str, ModelSpec]) -> ResolvedRequest:
    """Check that the UNets of a request have the branch of its feature cache. Raises InvalidRequest."""
    cache, refiner = resolved.parameters.feature_cache, resolved.parameters.refiner
    if cache is None:
        return resolved
    for name in (resolved.parameters.model, *([refiner.model] if refiner else [])):
        most = specs[name].unet_spec.blocks - 1
        expected = f"must be at most {most} for the model {name}"
        require([("feature_cache.branch", cache.branch <= most, expected)])
    return resolved.with_warnings([CACHED.format(cache.interval - 1, cache.interval)])


def target_size(hires: HiresInput, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the finished image, for a first pass of `size`. A missing side keeps proportions."""
    width, height = size
    if hires.width is None and hires.height is None:
        return int(width * hires.scale + 1e-6), int(height * hires.scale + 1e-6)
    wide, high = hires.width, hires.height
    return (
        wide if wide is not None else (high or 0) * width // height,
        high if high is not None else (wide or 0) * height // width,
    )


def check_second_pass(
    resolved: ResolvedRequest, hires: HiresInput, spec: ModelSpec, models: Sequence[str]
) -> None:
    """Check that a request can have a second pass. models: those that upscale. Raises InvalidRequest."""
    known = (*UPSCALERS, *models)
    inputs, parameters = resolved.inputs, resolved.parameters
    steps, most = hires.steps or 1, max_steps(parameters.sampler, spec.schedule.timesteps)
    require(
        (
            ("hires", not spec.edits, f"is not supported by the model {spec.name}"),
            ("boxes", not inputs.boxes and not parameters.boxes, "cannot be combined with hires"),
            ("segmentation", not inputs.regions, "cannot be combined with hires"),
            ("hires.upscaler", hires.upscaler in known, f"must be one of {', '.join(known)}"),
            ("hires.steps", steps <= most, f"must be at most {most}"),
        )
    )


def check_size(
    resolved: ResolvedRequest,
    first: ResolvedRequest,
    field: str,
    spec: ModelSpec,
    upscaler: ModelSpec | None,
    settings: Settings,
) -> None:
    """Check the size and the work of both passes. first: without the second. Raises InvalidRequest."""
    (width, height), n = resolved.final_canvas, resolved.parameters.n
    pixels, sizes = width * height, f"{width}x{height}"
    before = first.canvas_width * first.canvas_height
    work = n * (calls_of(first, spec) * before + calls_of(resolved, spec) * pixels)
    if upscaler:
        work += n * upscaler.defaults.steps * before * upscaler.autoencoder.factor**2
    larger = width >= first.canvas_width and height >= first.canvas_height and pixels > before
    require(
        (
            (field, larger, f"must give an image larger than the first pass, not {sizes}"),
            (
                "tiling",
                resolved.parameters.tiling is None or pixels <= MAX_WHOLE_PIXELS,
                f"needs images of at most {MAX_WHOLE_PIXELS} pixels",
            ),
            (field, pixels <= settings.max_pixels, f"gives {sizes}, more than {settings.max_pixels} pixels"),
            (
                field,
                work <= settings.max_work,
                f"is too large: the work of both passes is {work} and must be at most {settings.max_work}",
            ),
        )
    )


def check_prompts(first: ResolvedRequest, hires: Hires, spec: ModelSpec, settings: Settings) -> None:
    """Check the prompts of the second pass as those of the first. Raises InvalidRequest."""
    texts = {"prompt": hires.prompt, "negative_prompt": hires.negative_prompt}
    for name, text in texts.items():
        require([(f"hires.{name}", spec.reads_prompts or not text, NO_PROMPT)])
    second = replace(with_parameters(first, **texts), label_name="")
    try:
        check_prompt_options(second, spec)
        if first.parameters.prompt_syntax == "a1111":
            check_composition(second, settings.max_rows)
    except InvalidRequest as error:
        raise InvalidRequest(f"hires.{error}", param=f"hires.{error.param}") from None


def check_refiner(resolved: ResolvedRequest, base: ModelSpec, refiner: ModelSpec) -> None:
    """Check that a model can go on from the latents of another. Raises InvalidRequest."""
    parameters, inputs = resolved.parameters, resolved.inputs
    clip_skip, multiple = parameters.clip_skip or 1, refiner.size_multiple
    width, height = resolved.final_canvas
    fits = width % multiple == height % multiple == 0
    require(
        (
            ("refiner.model", base.name != refiner.name, "must differ from model"),
            (
                "refiner.model",
                takes_prompt_alone(refiner),
                "must be a model whose only input is a prompt",
            ),
            (
                "refiner.model",
                same_latents(base, refiner) and same_noise(base, refiner),
                f"must have the latents and the noise schedule of {base.name}",
            ),
            ("refiner.model", clip_skip <= refiner.max_clip_skip, "does not support this clip_skip"),
            ("refiner.model", fits, f"needs width and height in multiples of {multiple}"),
            ("controls", not inputs.controls, "cannot be combined with refiner"),
            ("reference_images", not inputs.references, "cannot be combined with refiner"),
        )
    )


def takes_prompt_alone(spec: ModelSpec) -> bool:
    """Whether the UNet's only inputs are x, t and a prompt's context."""
    return spec.reads_prompts and not spec.concat_channels and not spec.unet_spec.guidance_width


def same_latents(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether the UNets denoise latents of the same form."""
    a, b = one.autoencoder, other.autoencoder
    return (a.latent_channels, a.factor, a.scale_factor) == (
        b.latent_channels,
        b.factor,
        b.scale_factor,
    ) and (a.latents_mean, a.latents_std) == (b.latents_mean, b.latents_std)


def same_noise(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether one plan of a sampler suits both models."""
    a, b = one.schedule, other.schedule
    levels = [(each.sigma_range, each.sigma_data) for each in (a, b)]
    betas = [(each.beta_start, each.beta_end, each.beta_schedule, each.timesteps) for each in (a, b)]
    zero = a.zero_terminal_snr
    same = levels[0] == levels[1] and betas[0] == betas[1] and zero == b.zero_terminal_snr
    # At zero terminal SNR the plan depends on the prediction, too.
    return same and (not zero or a.prediction == b.prediction)


def calls_of(resolved: ResolvedRequest, spec: ModelSpec) -> int:
    """UNet calls of each image, with hires in the second pass."""
    parameters = resolved.parameters
    strength = 1.0 if parameters.strength is None else parameters.strength
    if resolved.hires:
        steps, strength = resolved.hires.steps, resolved.hires.strength
    else:
        steps = parameters.steps
    settings = (parameters.sampler, steps, parameters.eta, strength, parameters.spacing)
    return len(plan(Schedule(spec.schedule), *settings))

"""Adds the phases of a run to a resolved request: the refiner."""

from __future__ import annotations

from collections.abc import Mapping

from models.sampling.samplers import first_call, plan
from models.sampling.schedule import Schedule
from models.spec import ModelSpec
from service.errors import InvalidRequest
from service.requests.checks import require
from service.requests.resolved_request import ResolvedRequest, with_parameters
from service.requests.schemas import SceneRequest


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


def check_refiner(resolved: ResolvedRequest, base: ModelSpec, refiner: ModelSpec) -> None:
    """Check that a model can go on from the latents of another. Raises InvalidRequest."""
    parameters, inputs = resolved.parameters, resolved.inputs
    clip_skip, multiple = parameters.clip_skip or 1, refiner.size_multiple
    fits = resolved.canvas_width % multiple == resolved.canvas_height % multiple == 0
    require(
        (
            ("refiner.model", base.name != refiner.name, "must be another model than model"),
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
    return (a.latent_channels, a.factor, a.scale_factor) == (b.latent_channels, b.factor, b.scale_factor)


def same_noise(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether one plan of a sampler suits both models."""
    a, b = one.schedule, other.schedule
    betas = [(each.beta_start, each.beta_end, each.beta_schedule, each.timesteps) for each in (a, b)]
    zero = a.zero_terminal_snr
    # At zero terminal SNR the plan depends on the prediction, too.
    return betas[0] == betas[1] and zero == b.zero_terminal_snr and (not zero or a.prediction == b.prediction)


def calls_of(resolved: ResolvedRequest, spec: ModelSpec) -> int:
    """UNet calls of each image."""
    parameters = resolved.parameters
    strength = 1.0 if parameters.strength is None else parameters.strength
    settings = (parameters.sampler, parameters.steps, parameters.eta, strength, parameters.spacing)
    return len(plan(Schedule(spec.schedule), *settings))

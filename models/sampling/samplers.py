"""Samplers as tables: plan() computes every coefficient of a run ahead; step.step() applies them.

Every sampler here is linear in the latent, the history of earlier steps, the predicted eps and fresh noise.
All keep the latent as x = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, also those that are published on
x / alpha, so that rows of different samplers differ in numbers only and can share a batch.

Imports no torch, so that the process that checks requests can know the samplers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from models.sampling.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms, plms, unipc
from models.sampling.noise_path import (
    LCM_TIMESTEPS,
    MakePath,
    NoisePath,
    drop_last_path,
    exponential_path,
    interpolated_path,
    karras_path,
    lcm_path,
    pure_noise_path,
    schedule_path,
    tcd_path,
    whole_karras_path,
)
from models.sampling.schedule import TIMESTEP_SPACINGS, Schedule
from models.sampling.spacings import NOISE_SPACINGS
from models.sampling.table import EPS, Plan, X, build_plan, predicted_x_0
from models.sampling.two_calls import ancestral_step, dpm2, dpm2_ancestral, dpmpp_sde, heun
from models.spec import ModelSpec, Spacing


def plan(
    schedule: Schedule,
    sampler: str,
    steps: int,
    eta: float = 0.0,
    strength: float = 1.0,
    spacing: Spacing | None = None,
) -> Plan:
    """The coefficients of a whole run.

    eta: of DDIM, where 0 is deterministic and 1 adds as much noise as DDPM, and of TCD, where it is the
    paper's gamma. strength: image-to-image runs take this share of the steps, the last ones, at least one
    (Meng et al. 2022, algorithm 1). spacing: the schedule's own by default. Raises ValueError for an unknown
    sampler, steps outside the schedule, eta outside [0, 1] or for a sampler without it, strength outside
    (0, 1], and a spacing that the sampler does not have.
    """
    if sampler not in BUILDERS:
        raise ValueError(f"unknown sampler {sampler!r}; available: {', '.join(SAMPLERS)}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be 0 to 1, not {eta}")
    if eta and sampler not in ETA_SAMPLERS:
        raise ValueError(f"eta is not supported by {sampler}, only by {', '.join(ETA_SAMPLERS)}")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
    if spacing and spacing not in spacings_of(sampler):
        supported = ", ".join(spacings_of(sampler)) or "none: its timesteps follow from the steps"
        raise ValueError(f"spacing {spacing} is not supported by {sampler}; supported: {supported}")
    build = BUILDERS[sampler][1]
    path = path_of(schedule, sampler, steps, spacing)
    taken = max(1, int(len(path) * strength + 1e-9))  # 0.58 of 50 is 29, though floats say 28.999
    return build(path.last(taken), eta)


def path_of(schedule: Schedule, sampler: str, steps: int, spacing: Spacing | None) -> NoisePath:
    """One point for each step. Raises ValueError for steps outside the schedule."""
    if spacing in NOISE_SPACINGS:
        if not 1 <= steps <= len(schedule):
            raise ValueError(f"steps must be 1 to {len(schedule)}, not {steps}")
        return NOISE_SPACINGS[spacing](schedule, steps)
    make_path = BUILDERS[sampler][0]
    return make_path(schedule, steps, spacing if spacing in TIMESTEP_SPACINGS else None)


def ddim(path: NoisePath, eta: float) -> Plan:
    """Song et al. 2020, equations 12 and 16."""
    ab_t, ab_s = path.alpha[:-1] ** 2, path.alpha[1:] ** 2
    noise = eta * np.sqrt((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s))
    a = path.alpha[1:] / path.alpha[:-1]
    towards_x_t = np.sqrt(np.maximum(1 - ab_s - noise**2, 0.0))  # rounding may leave it just below 0
    b = towards_x_t - a * path.sigma[:-1]
    return build_plan(path, [x * X + e * EPS for x, e in zip(a, b, strict=True)], noise)


def ddpm(path: NoisePath, eta: float) -> Plan:
    """Ho et al. 2020, algorithm 2 with the smaller variance: DDIM at eta 1."""
    return ddim(path, 1.0)


def euler(path: NoisePath, eta: float) -> Plan:
    """Karras et al. 2022, algorithm 1 without its second order: a straight line in x / alpha."""
    next_x = [
        path.alpha[i + 1] * (X / path.alpha[i] + (path.ratio[i + 1] - path.ratio[i]) * EPS)
        for i in range(len(path))
    ]
    return build_plan(path, next_x, 0.0)


def euler_ancestral(path: NoisePath, eta: float) -> Plan:
    """Euler to less noise than the next point has, then fresh noise up to it (k-diffusion's "Euler a")."""
    next_x, fresh = [], []
    for i in range(len(path)):
        down, up = ancestral_step(path.ratio[i], path.ratio[i + 1])
        next_x.append(path.alpha[i + 1] * (X / path.alpha[i] + (down - path.ratio[i]) * EPS))
        fresh.append(path.alpha[i + 1] * up)
    return build_plan(path, next_x, np.array(fresh))


def lcm(path: NoisePath, eta: float) -> Plan:
    """Latent consistency (Luo et al. 2023): predict x_0 at once, then add noise up to the next point.

    Below timestep 1, where the consistency function becomes the identity, x_0 is taken as predicted.
    """
    next_x = []
    for i in range(len(path)):
        scaled = 10 * path.t[i]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        if path.t[i] < 1:
            skip, out = 0.0, 1.0
        next_x.append(path.alpha[i + 1] * (skip * X + out * predicted_x_0(path, i)))
    return build_plan(path, next_x, path.sigma[1:])


def tcd(path: NoisePath, eta: float) -> Plan:
    """Trajectory consistency (Zheng et al. 2024, algorithm 2, with eta for gamma), ending at timestep 0.

    x_0 and eps lead to the timestep (1 - eta) s, and fresh noise from there up to the next timestep s.
    """
    next_x, fresh, alpha_bar = [], [], path.schedule.alpha_bar
    for i, there in enumerate(np.append(path.t[1:], 0.0)):
        ab = alpha_bar[int((1 - eta) * there)]
        up = path.alpha[i + 1] / np.sqrt(ab)
        next_x.append(up * (np.sqrt(ab) * predicted_x_0(path, i) + np.sqrt(1 - ab) * EPS))
        fresh.append(np.sqrt(1 - up**2))
    return build_plan(path, next_x, np.array(fresh))


BUILDERS: dict[str, tuple[MakePath, Callable[[NoisePath, float], Plan]]] = {
    "ddim": (schedule_path, ddim),
    "ddpm": (pure_noise_path, ddpm),
    "plms": (schedule_path, plms),
    "euler": (interpolated_path, euler),
    "euler_karras": (karras_path, euler),
    "euler_exponential": (exponential_path, euler),
    "euler_ancestral": (interpolated_path, euler_ancestral),
    "euler_ancestral_karras": (karras_path, euler_ancestral),
    "euler_ancestral_exponential": (exponential_path, euler_ancestral),
    "heun": (interpolated_path, heun),
    "lms": (interpolated_path, lms),
    "dpm2": (interpolated_path, dpm2),
    "dpm2_ancestral": (interpolated_path, dpm2_ancestral),
    "dpmpp_2m": (drop_last_path, dpmpp_2m),
    "dpmpp_2m_karras": (whole_karras_path, dpmpp_2m),
    "dpmpp_2m_exponential": (exponential_path, dpmpp_2m),
    "dpmpp_sde": (interpolated_path, dpmpp_sde),
    "dpmpp_2m_sde": (drop_last_path, dpmpp_2m_sde),
    "dpmpp_3m_sde": (drop_last_path, dpmpp_3m_sde),
    "unipc": (drop_last_path, unipc),
    "lcm": (lcm_path, lcm),
    "tcd": (tcd_path, tcd),
}
SAMPLERS = tuple(BUILDERS)
DEFAULT_ETA = {"ddim": 0.0, "tcd": 0.3}  # of the samplers that take eta
ETA_SAMPLERS = tuple(DEFAULT_ETA)
TWO_CALL_SAMPLERS = ("heun", "dpm2", "dpm2_ancestral", "dpmpp_sde")  # call the UNet twice a step
OWN_SPACING = ("dpmpp_2m_karras", "lcm", "tcd")  # their timesteps follow from the steps alone by default
FIXED_SPACING = ("dpmpp_2m_karras", "tcd")  # and no other spacing can be chosen
# Take no spacing by noise levels: plms needs even timesteps, the others have such a spacing in their name.
NO_NOISE_SPACING = ("plms", *(name for name in SAMPLERS if name.endswith(("_karras", "_exponential"))))


def spacings_of(sampler: str) -> tuple[Spacing, ...]:
    """The spacings that a request for a sampler may name."""
    if sampler in FIXED_SPACING:
        return ()
    return (*TIMESTEP_SPACINGS, *(() if sampler in NO_NOISE_SPACING else NOISE_SPACINGS))


def default_spacing(spec: ModelSpec, sampler: str) -> Spacing | None:
    """The spacing of a request that names none; None: the sampler's own."""
    if spec.defaults.spacing and sampler == spec.defaults.sampler:
        return spec.defaults.spacing
    return None if sampler in OWN_SPACING else spec.schedule.spacing


def default_eta(spec: ModelSpec, sampler: str) -> float:
    """The eta of a request that names none."""
    if sampler == spec.defaults.sampler and spec.defaults.eta:
        return spec.defaults.eta
    return DEFAULT_ETA.get(sampler, 0.0)


def max_steps(sampler: str, timesteps: int) -> int:
    """The most steps of a run on a schedule of so many timesteps."""
    return min(LCM_TIMESTEPS, timesteps) if sampler in ("lcm", "tcd") else timesteps


def schedule_steps(sampler: str, steps: int) -> int:
    """The steps that a prompt's schedule counts: UNet calls, two for each step of a two-call sampler."""
    return 2 * steps if sampler in TWO_CALL_SAMPLERS else steps


def unet_calls(sampler: str, steps: int) -> int:
    """How often a run calls the UNet, to within one: the last step of a two-call sampler takes one call."""
    return 2 * steps - 1 if sampler in TWO_CALL_SAMPLERS else steps


def first_call(sampler: str, calls: int, part: float) -> int:
    """The first of a run's UNet calls, counted from 0, with at least this part of the calls before it.

    It begins a step: a two-call sampler's next step is taken if the part ends within one.
    """
    first = math.ceil(part * calls - 1e-9)  # 0.28 of 25 is 7, though floats say 7.000000000000001
    return min(first + first % 2 if sampler in TWO_CALL_SAMPLERS else first, calls)

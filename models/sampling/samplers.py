"""Samplers as tables: plan() computes every coefficient of a run ahead; step.step() applies them.

Every sampler here is linear in the latent, the history of earlier steps, the predicted eps and fresh noise.
All keep the latent as x = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, also those that are published on
x / alpha, so that rows of different samplers differ in numbers only and can share a batch.

Imports no torch, so that the process that checks requests can know the samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.sampling.noise_path import (
    LCM_TIMESTEPS,
    MakePath,
    NoisePath,
    drop_last_path,
    exponential_path,
    interpolated_path,
    karras_path,
    lcm_path,
    schedule_path,
    whole_karras_path,
    zero_noise_path,
)
from models.sampling.schedule import Floats, Schedule
from models.spec import Spacing

HISTORY = 3  # most latents of earlier steps that a sampler combines
TERMS = 1 + HISTORY + 1  # of a linear combination: x, the history, eps

# Columns of a line of coefficients. The UNet is called at T, where x = ALPHA x_0 + SIGMA eps; FRESH_NOISE is
# the factor of fresh noise; after the step the image's noise is that of NEXT_ALPHA and NEXT_SIGMA.
T, ALPHA, SIGMA, FRESH_NOISE, NEXT_ALPHA, NEXT_SIGMA = range(6)
COMBO_START = 6  # from here: 1 + HISTORY combinations of TERMS factors, for the next x and history

Combination = Floats  # (TERMS,): factors of x, of the history, and of eps


@dataclass(frozen=True, eq=False)
class Plan:
    """A run of a sampler: one line of coefficients for each UNet evaluation.

    start: (alpha, sigma) of the noised image that an image-to-image run starts from.
    """

    coeffs: Floats  # (n, COMBO_START + (1 + HISTORY) * TERMS)
    start: tuple[float, float]
    history: int = 0  # latents beside x that the run keeps: 0 or HISTORY

    def __len__(self) -> int:
        """How many UNet evaluations the run takes."""
        return len(self.coeffs)

    @property
    def timesteps(self) -> Floats:
        """(n,), in the order of evaluation."""
        timesteps: Floats = self.coeffs[:, T]
        return timesteps

    @property
    def needs_noise(self) -> NDArray[np.bool_]:
        """(n,): which steps add fresh noise."""
        needed: NDArray[np.bool_] = self.coeffs[:, FRESH_NOISE] > 0
        return needed


def plan(
    schedule: Schedule,
    sampler: str,
    steps: int,
    eta: float = 0.0,
    strength: float = 1.0,
    spacing: Spacing | None = None,
) -> Plan:
    """The coefficients of a whole run.

    eta: of DDIM; 0 is deterministic, 1 adds as much noise as DDPM. strength: image-to-image runs take this
    share of the steps, the last ones, at least one (Meng et al. 2022, algorithm 1). spacing: the schedule's
    own by default. Raises ValueError for an unknown sampler, steps outside the schedule, eta outside [0, 1]
    or for another sampler than DDIM, strength outside (0, 1], and a spacing for a sampler with a fixed one.
    """
    if sampler not in BUILDERS:
        raise ValueError(f"unknown sampler {sampler!r}; available: {', '.join(SAMPLERS)}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be 0 to 1, not {eta}")
    if eta and sampler not in ETA_SAMPLERS:
        raise ValueError(f"eta is not supported by {sampler}, only by {', '.join(ETA_SAMPLERS)}")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
    if spacing and sampler in OWN_SPACING:
        raise ValueError(f"spacing is not supported by {sampler}, which has a fixed one")
    make_path, build = BUILDERS[sampler]
    path = make_path(schedule, steps, spacing)
    taken = max(1, int(len(path) * strength + 1e-9))  # 0.58 of 50 is 29, though floats say 28.999
    return build(path.last(taken), eta)


X, *PAST, EPS = np.eye(TERMS)  # combinations of one term: x itself, one entry of the history, eps itself


def build_plan(
    path: NoisePath,
    next_x: Sequence[Combination],
    fresh_noise: Floats | float,
    history: Sequence[Sequence[Combination]] | None = None,
) -> Plan:
    """A plan from the combinations that make each next x and each next history.

    The noise level that masked images are restored at is 0 after the last step, whatever the path ends at.
    """
    n = len(path)
    coeffs = np.zeros((n, COMBO_START + (1 + HISTORY) * TERMS))
    coeffs[:, T], coeffs[:, ALPHA], coeffs[:, SIGMA] = path.t, path.alpha[:-1], path.sigma[:-1]
    coeffs[:, FRESH_NOISE] = fresh_noise
    coeffs[:, NEXT_ALPHA] = np.append(path.alpha[1:-1], 1.0)
    coeffs[:, NEXT_SIGMA] = np.append(path.sigma[1:-1], 0.0)
    combinations = coeffs[:, COMBO_START:].reshape(n, 1 + HISTORY, TERMS)
    combinations[:, 0] = next_x
    for index, kept in enumerate(history or []):
        combinations[index, 1 : 1 + len(kept)] = kept
    return Plan(coeffs, (float(path.alpha[0]), float(path.sigma[0])), HISTORY if history else 0)


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
        here, there = path.ratio[i], path.ratio[i + 1]
        up = there * np.sqrt(here**2 - there**2) / here
        down = np.sqrt(there**2 - up**2)
        next_x.append(path.alpha[i + 1] * (X / path.alpha[i] + (down - here) * EPS))
        fresh.append(path.alpha[i + 1] * up)
    return build_plan(path, next_x, np.array(fresh))


def predicted_x_0(path: NoisePath, i: int) -> Combination:
    """x_0 as predicted at point i."""
    x_0: Combination = (X - path.sigma[i] * EPS) / path.alpha[i]
    return x_0


def dpmpp_2m(path: NoisePath, eta: float) -> Plan:
    """DPM-Solver++ of second order, multistep (Lu et al. 2022, algorithm 2); first order at both ends.

    History: x_0 of the step before.
    """
    next_x, history, h = [], [], np.diff(path.log_snr)
    for i in range(len(path)):
        x_0 = d = predicted_x_0(path, i)
        if 0 < i < len(path) - 1:
            d = x_0 + h[i] / h[i - 1] / 2 * (x_0 - PAST[0])
        next_x.append(path.sigma[i + 1] / path.sigma[i] * X - path.alpha[i + 1] * np.expm1(-h[i]) * d)
        history.append([x_0])
    return build_plan(path, next_x, 0.0, history)


def unipc(path: NoisePath, eta: float) -> Plan:
    """UniPC of second order with B(h) = e^h - 1 (Zhao et al. 2023).

    The prediction at a point first corrects that point, then predicts the next. History: the corrected x, and
    x_0 of the two steps before.
    """
    next_x, history = [], []
    orders: list[int] = []
    x_before, x_0_before, x_0_earlier = PAST
    log_snr = path.log_snr
    for i in range(len(path)):
        x_0, corrected = predicted_x_0(path, i), X
        if i:
            h = log_snr[i] - log_snr[i - 1]
            known = [(x_0_before, 0.0), (x_0, 1.0)]
            if orders[-1] == 2:
                known.insert(1, (x_0_earlier, (log_snr[i - 2] - log_snr[i - 1]) / h))
            corrected = unipc_update(path, i - 1, h, x_before, known)
        orders.append(min(2, i + 1, len(path) - i))
        h = log_snr[i + 1] - log_snr[i]
        known = [(x_0, 0.0)]
        if orders[-1] == 2:
            known.append((x_0_before, (log_snr[i - 1] - log_snr[i]) / h))
        next_x.append(unipc_update(path, i, h, corrected, known))
        history.append([corrected, x_0, x_0_before])
    return build_plan(path, next_x, 0.0, history)


def unipc_update(
    path: NoisePath, i: int, h: float, x: Combination, known: list[tuple[Combination, float]]
) -> Combination:
    """The next x, from x at point i and known predictions of x_0.

    known: each x_0 with its position on the step, of which 0 is point i and 1 the next; the first is at 0.
    """
    (base, _), *others = known
    growth = np.expm1(-h)
    first_order: Combination = path.sigma[i + 1] / path.sigma[i] * x - path.alpha[i + 1] * growth * base
    if not others:
        return first_order
    positions = np.array([position for _, position in others])
    if len(others) == 1:
        weights = np.array([0.5])  # the published value: the limit of the system below as h vanishes
    else:
        phi_1 = growth / -h - 1
        phi_2 = phi_1 / -h - 0.5
        right = np.array([phi_1, 2 * phi_2]) / growth
        weights = np.linalg.solve(np.stack([np.ones_like(positions), positions]), right)
    slopes = sum(w * (x_0 - base) / position for w, (x_0, position) in zip(weights, others, strict=True))
    second_order: Combination = first_order - path.alpha[i + 1] * growth * slopes
    return second_order


ADAMS_BASHFORTH = (
    [1],
    [3 / 2, -1 / 2],
    [23 / 12, -16 / 12, 5 / 12],
    [55 / 24, -59 / 24, 37 / 24, -9 / 24],
)


def plms(path: NoisePath, eta: float) -> Plan:
    """Pseudo linear multistep (Liu et al. 2022) as in the LDM code: Adams-Bashforth in the UNet's prediction.

    The first step is Heun's, which calls the UNet a second time, at the next timestep or, if there is none,
    at the same. History: the predictions (eps or v) of earlier steps; after the first call, x and its
    prediction.
    """
    a = path.alpha[1:] / path.alpha[:-1]
    b = path.sigma[1:] - a * path.sigma[:-1]
    x_before, first = PAST[:2]

    def prediction(i: int, x: Combination, eps: Combination) -> Combination:
        return (eps - path.sigma[i] * x) / path.alpha[i] if path.predicts_v else eps

    def eps_of(i: int, x: Combination, predicted: Combination) -> Combination:
        return path.alpha[i] * predicted + path.sigma[i] * x if path.predicts_v else predicted

    both = eps_of(0, x_before, (first + prediction(1, X, EPS)) / 2)
    next_x, history = (
        [a[0] * X + b[0] * EPS, a[0] * x_before + b[0] * both],
        [[X, prediction(0, X, EPS)], [first]],
    )
    for i in range(1, len(path)):
        newest = prediction(i, X, EPS)
        terms = zip(ADAMS_BASHFORTH[min(i, 3)], [newest, *PAST], strict=False)
        mixed: Combination = sum((factor * term for factor, term in terms), np.zeros(TERMS))
        next_x.append(a[i] * X + b[i] * eps_of(i, X, mixed))
        history.append([newest, *PAST[:-1]])
    twice = np.insert(np.arange(len(path) + 1), 1, 1)  # the second point is visited in the first step too
    t = path.t[np.minimum(twice[:-1], len(path) - 1)]
    return build_plan(NoisePath(t, path.alpha[twice], path.sigma[twice]), next_x, 0.0, history)


def lcm(path: NoisePath, eta: float) -> Plan:
    """Latent consistency (Luo et al. 2023): predict x_0 at once, then add noise up to the next point."""
    next_x = []
    for i in range(len(path)):
        scaled = 10 * path.t[i]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        next_x.append(path.alpha[i + 1] * (skip * X + out * predicted_x_0(path, i)))
    return build_plan(path, next_x, path.sigma[1:])


BUILDERS: dict[str, tuple[MakePath, Callable[[NoisePath, float], Plan]]] = {
    "ddim": (schedule_path, ddim),
    "ddpm": (zero_noise_path, ddpm),
    "plms": (schedule_path, plms),
    "euler": (interpolated_path, euler),
    "euler_karras": (karras_path, euler),
    "euler_exponential": (exponential_path, euler),
    "euler_ancestral": (interpolated_path, euler_ancestral),
    "euler_ancestral_karras": (karras_path, euler_ancestral),
    "euler_ancestral_exponential": (exponential_path, euler_ancestral),
    "dpmpp_2m": (drop_last_path, dpmpp_2m),
    "dpmpp_2m_karras": (whole_karras_path, dpmpp_2m),
    "dpmpp_2m_exponential": (exponential_path, dpmpp_2m),
    "unipc": (drop_last_path, unipc),
    "lcm": (lcm_path, lcm),
}
SAMPLERS = tuple(BUILDERS)
ETA_SAMPLERS = ("ddim",)  # take eta
OWN_SPACING = ("dpmpp_2m_karras", "lcm")  # take no spacing: their timesteps follow from the steps alone


def max_steps(sampler: str, timesteps: int) -> int:
    """The most steps of a run on a schedule of so many timesteps."""
    return min(LCM_TIMESTEPS, timesteps) if sampler == "lcm" else timesteps

"""Samplers as tables: plan() computes every coefficient ahead, one step() serves them all.

Every sampler here is linear in what it has: the latent, what it remembers of earlier steps, the predicted eps
and fresh noise. All keep the latent as x = alpha x_0 + sigma eps with alpha^2 + sigma^2 = 1, also those that
are published on x / alpha, so that rows of different samplers differ in numbers only.

Free of torch at import, so that a process that only checks requests can know the samplers' names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from models.sampling.schedule import Schedule
from models.spec import Spacing

if TYPE_CHECKING:
    from torch import Tensor

MEMORY = 3  # latents that a sampler may remember
TERMS = 1 + MEMORY + 1  # what a line combines: x, what is remembered, eps
# The UNet is asked at t, where x = alpha x_0 + sigma eps. s: of the fresh noise. signal and rest: a picture
# that is known stands at signal * z + rest * noise after the step (equation 4 of Ho et al. 2020).
COLUMNS = ("t", "alpha", "sigma", "s", "signal", "rest")
FACTORS = len(COLUMNS)  # from there on: for x and each thing remembered, TERMS factors that make the next

LCM_STEPS = 50  # timesteps that a consistency model was distilled on (Luo et al. 2023)


@dataclass(frozen=True, eq=False)
class Plan:
    """One line of coefficients for each UNet evaluation of a run.

    start: (signal, rest) of what a run from a picture starts from; without one it starts from noise alone.
    """

    lines: np.ndarray  # (n, FACTORS + (1 + MEMORY) * TERMS) float64
    start: tuple[float, float]
    memory: int = 0  # how many latents beside x the run needs: 0 or MEMORY

    def __len__(self) -> int:
        """How many UNet evaluations the run takes."""
        return len(self.lines)

    @property
    def timesteps(self) -> np.ndarray:
        """(n,) float64, in the order of evaluation."""
        return self.lines[:, 0]

    @property
    def needs_noise(self) -> np.ndarray:
        """(n,) bool: which steps add fresh noise."""
        return self.lines[:, 3] > 0


@dataclass(frozen=True)
class Path:
    """Where a run passes: n points at which the UNet is asked, and the end."""

    t: np.ndarray  # (n,)
    alpha: np.ndarray  # (n + 1,)
    sigma: np.ndarray  # (n + 1,)
    predicts_v: bool = False  # the UNet, which PLMS minds

    def __len__(self) -> int:
        return len(self.t)

    @property
    def ratio(self) -> np.ndarray:
        """(n + 1,): sigma / alpha, the noise of x / alpha; descending."""
        return self.sigma / self.alpha

    @property
    def log_snr(self) -> np.ndarray:
        """(n + 1,): log(alpha / sigma), lambda in Lu et al. 2022; infinite where there is no noise."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)


def plan(
    schedule: Schedule,
    sampler: str,
    steps: int,
    eta: float = 0.0,
    strength: float = 1.0,
    spacing: Spacing | None = None,
) -> Plan:
    """The table of a whole run of a sampler.

    eta: of DDIM, 0 is deterministic, 1 adds as much noise as DDPM. strength: a run from a picture takes this
    share of the steps, the last ones, and at least one (Meng et al. 2022, algorithm 1). spacing: the
    schedule's own unless given. Raises ValueError for an unknown sampler, steps outside the schedule, eta
    outside [0, 1] or not of DDIM, strength outside (0, 1], and a spacing of a sampler that has its own.
    """
    if sampler not in BUILDERS:
        raise ValueError(f"unknown sampler {sampler!r}; there is {', '.join(SAMPLERS)}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be 0 to 1, not {eta}")
    if eta and sampler not in WITH_ETA:
        raise ValueError(f"eta is for {', '.join(WITH_ETA)}; {sampler} has none")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
    if spacing and sampler in SPACED:
        raise ValueError(f"{sampler} has a spacing of its own")
    visit, build = BUILDERS[sampler]
    path = visit(schedule, steps, spacing)
    taken = max(1, int(len(path) * strength + 1e-9))  # 0.58 of 50 is 29, though rounding says 28.999
    first = len(path) - taken
    path = replace(path, t=path.t[first:], alpha=path.alpha[first:], sigma=path.sigma[first:])
    return build(path, eta)


# Where the run passes.


def along(schedule: Schedule, steps: int, spacing: Spacing | None) -> Path:
    """The spacing's timesteps, and the schedule's own end."""
    t = schedule.timesteps(steps, spacing)
    ab = np.append(schedule.alpha_bar[t], schedule.final_alpha_bar)
    predicts_v = schedule.spec.prediction == "v_prediction"
    return Path(t.astype(np.float64), np.sqrt(ab), np.sqrt(1 - ab), predicts_v)


def to_clean(schedule: Schedule, steps: int, spacing: Spacing | None) -> Path:
    """The spacing's timesteps, and an end without noise."""
    return ended_clean(schedule, schedule.timesteps(steps, spacing))


def short_of_clean(schedule: Schedule, steps: int, spacing: Spacing | None) -> Path:
    """An end without noise in the place of the last of one timestep more, where the spacing ends so low that
    to ask there would be lost; as these samplers were published."""
    lower = (spacing or schedule.spec.spacing) != "trailing" and 1 <= steps < len(schedule)
    t = schedule.timesteps(steps + 1, spacing)[:-1] if lower else schedule.timesteps(steps, spacing)
    return ended_clean(schedule, t)


def ended_clean(schedule: Schedule, t: np.ndarray) -> Path:
    ab = np.append(schedule.alpha_bar[t], 1.0)
    return Path(t.astype(np.float64), np.sqrt(ab), np.sqrt(1 - ab))


def in_between(schedule: Schedule, steps: int, spacing: Spacing | None) -> Path:
    """As to_clean(), but the even points of linspace are where they are, not at whole timesteps."""
    if (spacing or schedule.spec.spacing) != "linspace":
        return to_clean(schedule, steps, spacing)
    t = np.linspace(0, len(schedule) - 1, len(schedule.timesteps(steps, spacing)))[::-1]
    table = ratios(schedule)
    return on_ratio(t, np.interp(t, np.arange(len(table)), table))


def ratios(schedule: Schedule) -> np.ndarray:
    """(T,), rising: sigma / alpha of every timestep."""
    return np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)


def on_ratio(t: np.ndarray, ratio: np.ndarray) -> Path:
    """A path by its noise of x / alpha, and an end without noise."""
    alpha = 1 / np.sqrt(1 + ratio**2)
    return Path(t, np.append(alpha, 1.0), np.append(ratio * alpha, 0.0))


def karras(whole: bool) -> Callable[[Schedule, int, Spacing | None], Path]:
    """Points even in ratio^(1/7) (Karras et al. 2022, equation 5): over the whole schedule, the UNet asked at
    whole timesteps, or between the spacing's first and last timestep, the UNet asked in between too."""

    def visit(schedule: Schedule, steps: int, spacing: Spacing | None) -> Path:
        table, t = ratios(schedule), schedule.timesteps(steps, spacing)
        high, low = (table[-1], table[0]) if whole else (table[t[0]], table[t[-1]])
        ramp = np.linspace(0, 1, steps)
        ratio = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        t = np.interp(np.log(ratio), np.log(table), np.arange(len(table)))
        return on_ratio(np.round(t) if whole else t, ratio)

    return visit


def distilled(schedule: Schedule, steps: int, spacing: Spacing | None) -> Path:
    """Timesteps among the LCM_STEPS that a consistency model knows. Raises ValueError for more."""
    known = min(LCM_STEPS, len(schedule))
    if not 1 <= steps <= known:
        raise ValueError(f"steps must be 1 to {known} for lcm, not {steps}")
    origin = (np.arange(1, known + 1) * (len(schedule) // known) - 1)[::-1]
    t = origin[np.floor(np.linspace(0, known, steps, endpoint=False)).astype(np.int64)]
    return ended_clean(schedule, t)


# What is combined into what comes next. A form is (TERMS,): factors of x, of what is remembered, and of eps.

X, *REMEMBERED, EPS = np.eye(TERMS)


def lines_of(path: Path, nexts: list[np.ndarray], s: np.ndarray | float, memory: list | None = None) -> Plan:
    """A plan from the form of each next x, the factor of noise, and the forms of what is remembered then.

    What is known ends without noise, whatever the schedule ends at.
    """
    n = len(path)
    lines = np.zeros((n, FACTORS + (1 + MEMORY) * TERMS))
    lines[:, 0], lines[:, 1], lines[:, 2], lines[:, 3] = path.t, path.alpha[:-1], path.sigma[:-1], s
    lines[:, 4], lines[:, 5] = np.append(path.alpha[1:-1], 1.0), np.append(path.sigma[1:-1], 0.0)
    forms = lines[:, FACTORS:].reshape(n, 1 + MEMORY, TERMS)
    forms[:, 0] = nexts
    for line, remembered in enumerate(memory or []):
        forms[line, 1 : 1 + len(remembered)] = remembered
    return Plan(lines, (float(path.alpha[0]), float(path.sigma[0])), MEMORY if memory else 0)


def ddim(path: Path, eta: float) -> Plan:
    """Song et al. 2020, equations 12 and 16."""
    ab_t, ab_s = path.alpha[:-1] ** 2, path.alpha[1:] ** 2
    noise = eta * np.sqrt((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s))
    a = path.alpha[1:] / path.alpha[:-1]
    towards_x_t = np.sqrt(np.maximum(1 - ab_s - noise**2, 0.0))  # rounding may leave it just below 0
    b = towards_x_t - a * path.sigma[:-1]
    return lines_of(path, [x * X + e * EPS for x, e in zip(a, b, strict=True)], noise)


def ddpm(path: Path, eta: float) -> Plan:
    """Ho et al. 2020, algorithm 2 with the smaller variance: DDIM at eta 1."""
    return ddim(path, 1.0)


def euler(path: Path, eta: float) -> Plan:
    """Karras et al. 2022, algorithm 1 without its second order: a straight line in x / alpha."""
    forms = [
        path.alpha[i + 1] * (X / path.alpha[i] + (path.ratio[i + 1] - path.ratio[i]) * EPS)
        for i in range(len(path))
    ]
    return lines_of(path, forms, 0.0)


def euler_ancestral(path: Path, eta: float) -> Plan:
    """Euler to less noise than the next point has, and fresh noise up to it."""
    forms, fresh = [], []
    for i in range(len(path)):
        here, there = path.ratio[i], path.ratio[i + 1]
        up = there * np.sqrt(here**2 - there**2) / here
        down = np.sqrt(there**2 - up**2)
        forms.append(path.alpha[i + 1] * (X / path.alpha[i] + (down - here) * EPS))
        fresh.append(path.alpha[i + 1] * up)
    return lines_of(path, forms, np.array(fresh))


def x_0_of(path: Path, i: int) -> np.ndarray:
    """The form of the predicted x_0."""
    return (X - path.sigma[i] * EPS) / path.alpha[i]


def dpmpp_2m(path: Path, eta: float) -> Plan:
    """DPM-Solver++ of second order, multistep (Lu et al. 2022, algorithm 2); its ends are of first order."""
    forms, memory, h = [], [], np.diff(path.log_snr)
    for i in range(len(path)):
        x_0 = d = x_0_of(path, i)
        if 0 < i < len(path) - 1:
            d = x_0 + h[i] / h[i - 1] / 2 * (x_0 - REMEMBERED[0])
        forms.append(path.sigma[i + 1] / path.sigma[i] * X - path.alpha[i + 1] * np.expm1(-h[i]) * d)
        memory.append([x_0])
    return lines_of(path, forms, 0.0, memory)


def unipc(path: Path, eta: float) -> Plan:
    """UniPC of second order with B(h) = e^h - 1 (Zhao et al. 2023): the UNet's answer at a predicted point
    corrects that point before the next is predicted. Remembered: the corrected x, and two x_0."""
    forms, memory, orders = [], [], []
    x_before, x_0_before, x_0_earlier = REMEMBERED
    log_snr = path.log_snr
    for i in range(len(path)):
        x_0, corrected = x_0_of(path, i), X
        if i:
            h = log_snr[i] - log_snr[i - 1]
            known = [(x_0_before, 0.0), (x_0, 1.0)]
            if orders[-1] == 2:
                known.insert(1, (x_0_earlier, (log_snr[i - 2] - log_snr[i - 1]) / h))
            corrected = uni(path, i - 1, h, x_before, known)
        orders.append(min(2, i + 1, len(path) - i))
        h = log_snr[i + 1] - log_snr[i]
        known = [(x_0, 0.0)]
        if orders[-1] == 2:
            known.append((x_0_before, (log_snr[i - 1] - log_snr[i]) / h))
        forms.append(uni(path, i, h, corrected, known))
        memory.append([corrected, x_0, x_0_before])
    return lines_of(path, forms, 0.0, memory)


def uni(path: Path, i: int, h: float, x: np.ndarray, known: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """The form of the next x, from x at point i and known x_0, each with its place: 0 is i, 1 the next."""
    (base, _), *others = known
    growth = np.expm1(-h)
    step = path.sigma[i + 1] / path.sigma[i] * x - path.alpha[i + 1] * growth * base
    if not others:
        return step
    places = np.array([place for _, place in others])
    if len(others) == 1:
        weights = np.array(
            [0.5]
        )  # what the system below comes to as h vanishes, and what is published for it
    else:
        phi_1 = growth / -h - 1
        phi_2 = phi_1 / -h - 0.5
        right = np.array([phi_1, 2 * phi_2]) / growth
        weights = np.linalg.solve(np.stack([np.ones_like(places), places]), right)
    slopes = sum(w * (form - base) / place for w, (form, place) in zip(weights, others, strict=True))
    return step - path.alpha[i + 1] * growth * slopes


ADAMS = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


def plms(path: Path, eta: float) -> Plan:
    """Pseudo linear multistep (Liu et al. 2022) as the LDM code has it: Adams-Bashforth in what the UNet
    predicts, eps or v, begun by one step of Heun's, which asks the UNet once more, at the next timestep or,
    if there is none, at the same."""
    a = path.alpha[1:] / path.alpha[:-1]
    b = path.sigma[1:] - a * path.sigma[:-1]
    x_before, first = REMEMBERED[:2]

    def predicted(i: int, x: np.ndarray, eps: np.ndarray) -> np.ndarray:
        return (eps - path.sigma[i] * x) / path.alpha[i] if path.predicts_v else eps

    def eps_of(i: int, x: np.ndarray, combined: np.ndarray) -> np.ndarray:
        return path.alpha[i] * combined + path.sigma[i] * x if path.predicts_v else combined

    both = eps_of(0, x_before, (first + predicted(1, X, EPS)) / 2)
    forms, memory = (
        [a[0] * X + b[0] * EPS, a[0] * x_before + b[0] * both],
        [[X, predicted(0, X, EPS)], [first]],
    )
    for i in range(1, len(path)):
        newest = predicted(i, X, EPS)
        terms = zip(ADAMS[min(i, 3)], [newest, *REMEMBERED], strict=False)
        forms.append(a[i] * X + b[i] * eps_of(i, X, sum(factor * form for factor, form in terms)))
        memory.append([newest, *REMEMBERED[:-1]])
    twice = np.insert(np.arange(len(path) + 1), 1, 1)  # the second point is asked at the first step too
    t = path.t[np.minimum(twice[:-1], len(path) - 1)]
    twice = Path(t, path.alpha[twice], path.sigma[twice])
    return lines_of(twice, forms, 0.0, memory)


def lcm(path: Path, eta: float) -> Plan:
    """Latent consistency (Luo et al. 2023): straight to the end, and noise again up to the next point."""
    forms = []
    for i in range(len(path)):
        scaled = 10 * path.t[i]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
        forms.append(path.alpha[i + 1] * (skip * X + out * x_0_of(path, i)))
    return lines_of(path, forms, path.sigma[1:])


Visit = Callable[[Schedule, int, Spacing | None], Path]
BUILDERS: dict[str, tuple[Visit, Callable[[Path, float], Plan]]] = {
    "ddim": (along, ddim),
    "ddpm": (to_clean, ddpm),
    "plms": (along, plms),
    "euler": (in_between, euler),
    "euler_karras": (karras(whole=False), euler),
    "euler_ancestral": (in_between, euler_ancestral),
    "dpmpp_2m": (short_of_clean, dpmpp_2m),
    "dpmpp_2m_karras": (karras(whole=True), dpmpp_2m),
    "unipc": (short_of_clean, unipc),
    "lcm": (distilled, lcm),
}
SAMPLERS = tuple(BUILDERS)


def most_steps(sampler: str, timesteps: int) -> int:
    """The most steps of a run on a schedule of so many timesteps."""
    return min(LCM_STEPS, timesteps) if sampler == "lcm" else timesteps


WITH_ETA = ("ddim",)
SPACED = ("dpmpp_2m_karras", "lcm")  # by themselves: over the whole schedule, as distilled


def step(state: Tensor, eps: Tensor, lines: Tensor, noise: Tensor | None = None) -> Tensor:
    """One update of every row by a line of its own, in float32.

    state: (B, 1 + m, C, h, w), x and what is remembered, m at least the plans' memory; eps, noise: (B, C, h,
    w); lines: (B, ...) as in Plan. Without noise its term is left out, which is right only where every line
    has s = 0. -> (B, 1 + m, C, h, w) float32.
    """
    count, lines = state.shape[1], lines.float()
    forms = lines[:, FACTORS:].unflatten(1, (1 + MEMORY, TERMS))[:, :count, :, None, None, None]
    out = forms[:, :, -1] * eps.float()[:, None]
    for term in range(count):  # always in this order, so that company with a longer memory changes no bit
        out = out + forms[:, :, term] * state[:, term : term + 1].float()
    if noise is not None:
        out[:, 0] += lines[:, 3, None, None, None] * noise.float()
    return out


def keep(x: Tensor, z: Tensor, noise: Tensor, mask: Tensor, lines: Tensor) -> Tensor:
    """Put back what is known after a step: inpainting by blending latents (Lugmayr et al. 2022, equation 8).

    x, z, noise: (B, C, h, w), z the known latent and noise what the run started from; mask: (B, 1, h, w), 1
    where the run may paint; lines: (B, ...) as in Plan. -> (B, C, h, w) float32.
    """
    signal, rest = lines.float()[:, 4:FACTORS, None, None, None].unbind(1)  # each (B, 1, 1, 1)
    return mask * x + (1 - mask) * (signal * z + rest * noise)

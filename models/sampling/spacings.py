"""Spacings that choose noise levels over the whole schedule, not timesteps. Imports no torch.

Each takes (schedule, steps) and returns a NoisePath that ends at sigma = 0. A ratio is sigma / alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gamma

import numpy as np

from models.sampling.noise_path import (
    NoisePath,
    exponential_ratios,
    karras_ratios,
    path_of_ratios,
    schedule_ratios,
    timestep_of,
)
from models.sampling.schedule import Floats, Schedule
from models.spec import NoiseSpacing


def ends(schedule: Schedule) -> tuple[float, float]:
    """The largest and the smallest ratio of the schedule."""
    table = schedule_ratios(schedule)
    return float(table[-1]), float(table[0])


def path_between(schedule: Schedule, ratio: Floats) -> NoisePath:
    """A path of these ratios, at fractional timesteps."""
    return path_of_ratios(schedule, timestep_of(schedule, ratio), ratio)


def karras(schedule: Schedule, steps: int) -> NoisePath:
    """Evenly spaced in ratio^(1/7) (Karras et al. 2022, equation 5)."""
    return path_between(schedule, karras_ratios(*ends(schedule), steps))


def exponential(schedule: Schedule, steps: int) -> NoisePath:
    """Evenly spaced in log(ratio)."""
    return path_between(schedule, exponential_ratios(*ends(schedule), steps))


def sgm_uniform(schedule: Schedule, steps: int) -> NoisePath:
    """Evenly spaced fractional timesteps from the last down to timestep 0, which is left out."""
    t = np.linspace(len(schedule) - 1, 0, steps + 1)[:-1]
    table = np.log(schedule_ratios(schedule))
    return path_of_ratios(schedule, t, np.exp(np.interp(t, np.arange(len(table)), table)))


def simple(schedule: Schedule, steps: int) -> NoisePath:
    """Every (T / steps)th timestep down from the last, rounded up (ComfyUI's "simple")."""
    t = len(schedule) - 1 - np.floor(np.arange(steps) * (len(schedule) / steps))
    return path_of_ratios(schedule, t, schedule_ratios(schedule)[t.astype(np.int64)])


def beta(schedule: Schedule, steps: int) -> NoisePath:
    """Quantiles of a beta distribution between the ends, as A1111 and diffusers do it (Lee et al. 2024)."""
    high, low = ends(schedule)
    return path_between(schedule, low + beta_quantile(1 - np.linspace(0, 1, steps)) * (high - low))


BETA_SHAPE = 0.6  # both parameters of the beta distribution
SERIES_TERMS = 60  # enough for float64: each term is at most half the one before


def beta_quantile(p: Floats) -> Floats:
    """Where the beta distribution of shape (BETA_SHAPE, BETA_SHAPE) has the probability p below it."""
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    lower_half = np.minimum(p, 1 - p)  # the distribution is symmetric
    for _ in range(200):
        middle = (low + high) / 2
        below = beta_probability(middle) < lower_half
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(p <= 0.5, high, 1 - high)


def beta_probability(x: Floats) -> Floats:
    """The regularised incomplete beta function of x up to 1/2, as a power series."""
    n = np.arange(SERIES_TERMS)
    factors = np.cumprod(np.append(1.0, (n[1:] - BETA_SHAPE) / n[1:])) / (BETA_SHAPE + n)
    total: Floats = (factors * x[:, None] ** n).sum(axis=1)
    return x**BETA_SHAPE * total * gamma(2 * BETA_SHAPE) / gamma(BETA_SHAPE) ** 2


NOISE_SPACINGS: dict[NoiseSpacing, Callable[[Schedule, int], NoisePath]] = {
    "karras": karras,
    "exponential": exponential,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "beta": beta,
}

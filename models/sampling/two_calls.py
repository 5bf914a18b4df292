"""Samplers that call the UNet twice a step: two lines for each step but the last. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from models.sampling.noise_path import NoisePath, path_of_ratios, timestep_of
from models.sampling.table import EPS, PAST, Combination, Plan, X, build_plan, predicted_x_0


def ancestral_step(here: float, there: float) -> tuple[float, float]:
    """A step between two noise levels of x / alpha: the level to step down to, and fresh noise up to `there`.

    (Song et al. 2020, equation 16 at eta 1, as k-diffusion has it.)
    """
    up = there * np.sqrt(here**2 - there**2) / here
    return float(np.sqrt(there**2 - up**2)), float(up)


def with_second_calls(path: NoisePath, second: NoisePath) -> NoisePath:
    """The path of all UNet calls: after each point but the last, one of `second` follows."""
    places = np.arange(1, len(path))
    return replace(
        path,
        t=np.insert(path.t, places, second.t),
        alpha=np.insert(path.alpha, places, second.alpha[:-1]),
        sigma=np.insert(path.sigma, places, second.sigma[:-1]),
    )


def next_points(path: NoisePath) -> NoisePath:
    """For the second call of every step but the last: the point that the step leads to."""
    return replace(path, t=path.t[1:], alpha=path.alpha[1:], sigma=path.sigma[1:])


def middle_points(path: NoisePath, ends: list[float]) -> NoisePath:
    """For the second call of every step but the last: halfway to its end, in log(ratio)."""
    ratio = np.sqrt(path.ratio[:-2] * np.array(ends))
    return path_of_ratios(path.schedule, timestep_of(path.schedule, ratio), ratio)


def euler_step(path: NoisePath, i: int, end: float, alpha: float) -> Combination:
    """From point i to the noise level `end` of x / alpha, along eps; the result is at that alpha."""
    x: Combination = alpha * (X / path.alpha[i] + (end - path.ratio[i]) * EPS)
    return x


def last_step(path: NoisePath) -> Combination:
    """To x_0, or wherever the path ends, with one call."""
    return euler_step(path, len(path) - 1, path.ratio[-1], path.alpha[-1])


def heun(path: NoisePath, eta: float) -> Plan:
    """Karras et al. 2022, algorithm 1: Euler's step is corrected by eps at its end.

    History: the half of the step that the first eps makes.
    """
    next_x, history = [], []
    for i in range(len(path) - 1):
        alpha, there = path.alpha[i + 1], path.ratio[i + 1]
        halfway = (path.ratio[i] + there) / 2
        next_x += [euler_step(path, i, there, alpha), PAST[0] + alpha * (there - halfway) * EPS]
        history += [[euler_step(path, i, halfway, alpha)], []]
    calls = with_second_calls(path, next_points(path))
    return build_plan(calls, [*next_x, last_step(path)], 0.0, [*history, []])


def dpm2(path: NoisePath, eta: float) -> Plan:
    """DPM-Solver-2 (Lu et al. 2022) as in k-diffusion: the whole step with eps of its middle.

    History: x, rescaled.
    """
    return midpoint(path, [(there, 0.0) for there in path.ratio[1:-1]])


def dpm2_ancestral(path: NoisePath, eta: float) -> Plan:
    """dpm2 to less noise than the next point has, then fresh noise up to it (k-diffusion's DPM2 a)."""
    return midpoint(path, [ancestral_step(*path.ratio[i : i + 2]) for i in range(len(path) - 1)])


def midpoint(path: NoisePath, ends: list[tuple[float, float]]) -> Plan:
    """dpm2 with the end of each step but the last, and the fresh noise after it, both of x / alpha."""
    middles = middle_points(path, [down for down, _ in ends])
    next_x, history, fresh = [], [], []
    for i, (down, up) in enumerate(ends):
        alpha = path.alpha[i + 1]
        next_x += [
            euler_step(path, i, middles.ratio[i], middles.alpha[i]),
            PAST[0] + alpha * (down - path.ratio[i]) * EPS,
        ]
        history += [[alpha / path.alpha[i] * X], []]
        fresh += [0.0, alpha * up]
    calls = with_second_calls(path, middles)
    return build_plan(calls, [*next_x, last_step(path)], np.array([*fresh, 0.0]), [*history, []])


def dpmpp_sde(path: NoisePath, eta: float) -> Plan:
    """SDE-DPM-Solver++ of second order, single step, with r = 1/2 (k-diffusion's DPM++ SDE).

    Both calls of a step share a Brownian motion: the noise of the whole step contains that of its first half.
    History: the first half's x without its noise, and x, rescaled.
    """
    middles = middle_points(path, list(path.ratio[1:-1]))
    next_x, history, fresh = [], [], []
    for i in range(len(path) - 1):
        here, middle, there = path.ratio[i], middles.ratio[i], path.ratio[i + 1]
        (half_down, half_up), (down, up) = ancestral_step(here, middle), ancestral_step(here, there)
        y, alpha = X / path.alpha[i], path.alpha[i + 1]
        shrink = half_down / here
        mean = middles.alpha[i] * (shrink * y + (1 - shrink) * predicted_x_0(path, i))
        first_noise = (X - PAST[0]) / (middles.alpha[i] * half_up)
        shared = np.sqrt((here - middle) / (here - there))  # correlation with the noise of the whole step
        next_x += [
            mean,
            PAST[1]
            + alpha * (1 - down / here) * predicted_x_0(middles, i)
            + alpha * up * shared * first_noise,
        ]
        history += [[mean, alpha * down / here * y], []]
        fresh += [middles.alpha[i] * half_up, alpha * up * np.sqrt(1 - shared**2)]
    calls = with_second_calls(path, middles)
    return build_plan(calls, [*next_x, last_step(path)], np.array([*fresh, 0.0]), [*history, []])

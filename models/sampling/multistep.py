"""Samplers that combine the predictions of several steps. Imports no torch."""

from __future__ import annotations

import numpy as np

from models.sampling.noise_path import NoisePath
from models.sampling.table import EPS, PAST, TERMS, Combination, Plan, X, build_plan, predicted_x_0


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
    return build_plan(NoisePath(path.schedule, t, path.alpha[twice], path.sigma[twice]), next_x, 0.0, history)


LMS_ORDER = 4


def lms(path: NoisePath, eta: float) -> Plan:
    """Linear multistep of fourth order in eps, on x / alpha (k-diffusion's LMS).

    The polynomial through the last four eps is integrated exactly over the step. History: the earlier eps.
    """
    next_x, history, ratio = [], [], path.ratio
    for i in range(len(path)):
        change = np.zeros(TERMS)
        known = min(i + 1, LMS_ORDER)
        for index, eps in zip(range(known), [EPS, *PAST], strict=False):
            others = [ratio[i - k] for k in range(known) if k != index]
            change += lagrange_integral(ratio[i - index], others, ratio[i], ratio[i + 1]) * eps
        next_x.append(path.alpha[i + 1] * (X / path.alpha[i] + change))
        history.append([EPS, *PAST[:-1]])
    return build_plan(path, next_x, 0.0, history)


def lagrange_integral(node: float, others: list[float], start: float, end: float) -> float:
    """The integral from start to end of the polynomial that is 1 at the node and 0 at up to three others."""
    middle, half = (start + end) / 2, (end - start) / 2
    # Gauss-Legendre with two points is exact up to third order.
    points = [middle - half / np.sqrt(3), middle + half / np.sqrt(3)]
    return float(half * sum(np.prod([(x - o) / (node - o) for o in others]) for x in points))


def dpmpp_2m_sde(path: NoisePath, eta: float) -> Plan:
    """SDE-DPM-Solver++ of second order, multistep, with the midpoint rule (k-diffusion's DPM++ 2M SDE).

    First order at both ends. History: x_0 of the step before.
    """
    next_x, fresh, history, h = [], [], [], np.diff(path.log_snr)
    for i in range(len(path)):
        x_0 = d = predicted_x_0(path, i)
        if 0 < i < len(path) - 1:
            d = x_0 + h[i] / h[i - 1] / 2 * (x_0 - PAST[0])
        next_x.append(sde_step(path, i, h[i], d))
        fresh.append(path.sigma[i + 1] * np.sqrt(-np.expm1(-2 * h[i])))
        history.append([x_0])
    return build_plan(path, next_x, np.array(fresh), history)


def sde_step(path: NoisePath, i: int, h: float, x_0: Combination) -> Combination:
    """The mean of the next x where x_0 stays constant over a step of length h."""
    decay = path.sigma[i + 1] / path.sigma[i] * np.exp(-h)
    mean: Combination = decay * X - path.alpha[i + 1] * np.expm1(-2 * h) * x_0
    return mean


def dpmpp_3m_sde(path: NoisePath, eta: float) -> Plan:
    """SDE-DPM-Solver++ of third order, multistep (k-diffusion's DPM++ 3M SDE).

    First order at both ends, second order in the second step. History: x_0 of the two steps before.
    """
    next_x, fresh, history, h = [], [], [], np.diff(path.log_snr)
    x_0_before, x_0_earlier = PAST[:2]
    for i in range(len(path)):
        x_0 = predicted_x_0(path, i)
        mean = sde_step(path, i, h[i], x_0)
        if 0 < i < len(path) - 1:
            phi_2 = np.expm1(-2 * h[i]) / (2 * h[i]) + 1
            first = slope = (x_0 - x_0_before) * h[i] / h[i - 1]
            if i > 1:
                before, earlier = h[i - 1] / h[i], h[i - 2] / h[i]
                change = (first - (x_0_before - x_0_earlier) / earlier) / (before + earlier)
                slope = first + change * before
                mean = mean - path.alpha[i + 1] * (phi_2 / (2 * h[i]) - 0.5) * change
            mean = mean + path.alpha[i + 1] * phi_2 * slope
        next_x.append(mean)
        fresh.append(path.sigma[i + 1] * np.sqrt(-np.expm1(-2 * h[i])))
        history.append([x_0, x_0_before])
    return build_plan(path, next_x, np.array(fresh), history)

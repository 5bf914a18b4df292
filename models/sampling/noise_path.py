"""The points that a sampling run passes: at which timesteps and noise levels the UNet is called.

Every function here takes (schedule, steps, spacing) and returns a NoisePath; a sampler names the one that it
was published with. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from models.sampling.schedule import Floats, Schedule, Timesteps
from models.spec import Spacing

LCM_TIMESTEPS = 50  # timesteps that a latent consistency model was distilled on (Luo et al. 2023)


@dataclass(frozen=True)
class NoisePath:
    """n points at which the UNet is called, where x = alpha x_0 + sigma eps, and the end point."""

    t: Floats  # (n,)
    alpha: Floats  # (n + 1,)
    sigma: Floats  # (n + 1,)
    predicts_v: bool = False  # the UNet predicts v; only PLMS needs to know

    def __len__(self) -> int:
        return len(self.t)

    @property
    def ratio(self) -> Floats:
        """(n + 1,): sigma / alpha, the noise of x / alpha; descending."""
        return self.sigma / self.alpha

    @property
    def log_snr(self) -> Floats:
        """(n + 1,): log(alpha / sigma), lambda in Lu et al. 2022; infinite where there is no noise."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    def last(self, count: int) -> NoisePath:
        """The last `count` points and the end."""
        first = len(self) - count
        return replace(self, t=self.t[first:], alpha=self.alpha[first:], sigma=self.sigma[first:])


def schedule_path(schedule: Schedule, steps: int, spacing: Spacing | None) -> NoisePath:
    """The spacing's timesteps, ending at the schedule's own final alpha_bar."""
    t = schedule.timesteps(steps, spacing)
    ab = np.append(schedule.alpha_bar[t], schedule.final_alpha_bar)
    predicts_v = schedule.spec.prediction == "v_prediction"
    return NoisePath(t.astype(np.float64), np.sqrt(ab), np.sqrt(1 - ab), predicts_v)


def zero_noise_path(schedule: Schedule, steps: int, spacing: Spacing | None) -> NoisePath:
    """The spacing's timesteps, ending at sigma = 0."""
    return ending_at_zero(schedule, schedule.timesteps(steps, spacing))


def drop_last_path(schedule: Schedule, steps: int, spacing: Spacing | None) -> NoisePath:
    """The last of steps + 1 timesteps is dropped, and the run ends at sigma = 0 instead.

    DPM-Solver++ and UniPC were published so, for spacings whose last timestep has next to no noise.
    """
    drops = (spacing or schedule.spec.spacing) != "trailing" and 1 <= steps < len(schedule)
    t = schedule.timesteps(steps + 1, spacing)[:-1] if drops else schedule.timesteps(steps, spacing)
    return ending_at_zero(schedule, t)


def ending_at_zero(schedule: Schedule, t: Timesteps) -> NoisePath:
    ab = np.append(schedule.alpha_bar[t], 1.0)
    return NoisePath(t.astype(np.float64), np.sqrt(ab), np.sqrt(1 - ab))


def interpolated_path(schedule: Schedule, steps: int, spacing: Spacing | None) -> NoisePath:
    """As zero_noise_path, but "linspace" keeps fractional timesteps and interpolates their noise."""
    if (spacing or schedule.spec.spacing) != "linspace":
        return zero_noise_path(schedule, steps, spacing)
    t = np.linspace(0, len(schedule) - 1, len(schedule.timesteps(steps, spacing)))[::-1]
    table = schedule_ratios(schedule)
    return path_of_ratios(t, np.interp(t, np.arange(len(table)), table))


def schedule_ratios(schedule: Schedule) -> Floats:
    """(T,), ascending: sigma / alpha of every timestep."""
    ratios: Floats = np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar)
    return ratios


def path_of_ratios(t: Floats, ratio: Floats) -> NoisePath:
    """A path given by sigma / alpha at its points, ending at sigma = 0."""
    alpha = 1 / np.sqrt(1 + ratio**2)
    return NoisePath(t, np.append(alpha, 1.0), np.append(ratio * alpha, 0.0))


def karras_path(
    schedule: Schedule, steps: int, spacing: Spacing | None, whole_schedule: bool = False
) -> NoisePath:
    """Points that are evenly spaced in ratio^(1/7) (Karras et al. 2022, equation 5).

    They lie between the spacing's first and last timestep, at fractional timesteps; with whole_schedule,
    between the schedule's own ends, rounded to whole timesteps.
    """
    table, t = schedule_ratios(schedule), schedule.timesteps(steps, spacing)
    high, low = (table[-1], table[0]) if whole_schedule else (table[t[0]], table[t[-1]])
    ramp = np.linspace(0, 1, steps)
    ratio = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    fractional = np.interp(np.log(ratio), np.log(table), np.arange(len(table)))
    return path_of_ratios(np.round(fractional) if whole_schedule else fractional, ratio)


def whole_karras_path(schedule: Schedule, steps: int, spacing: Spacing | None) -> NoisePath:
    """karras_path over the whole schedule."""
    return karras_path(schedule, steps, spacing, whole_schedule=True)


def exponential_path(schedule: Schedule, steps: int, spacing: Spacing | None) -> NoisePath:
    """Points evenly spaced in log(ratio) between the spacing's first and last, at fractional timesteps."""
    table, t = schedule_ratios(schedule), schedule.timesteps(steps, spacing)
    log_ratio = np.linspace(np.log(table[t[0]]), np.log(table[t[-1]]), steps)
    fractional = np.interp(log_ratio, np.log(table), np.arange(len(table)))
    return path_of_ratios(fractional, np.exp(log_ratio))


def lcm_path(schedule: Schedule, steps: int, spacing: Spacing | None) -> NoisePath:
    """Timesteps among the LCM_TIMESTEPS of the distillation. Raises ValueError for more steps than those."""
    known = min(LCM_TIMESTEPS, len(schedule))
    if not 1 <= steps <= known:
        raise ValueError(f"steps must be 1 to {known} for lcm, not {steps}")
    distilled = (np.arange(1, known + 1) * (len(schedule) // known) - 1)[::-1]
    chosen = np.floor(np.linspace(0, known, steps, endpoint=False)).astype(np.int64)
    return ending_at_zero(schedule, distilled[chosen])


MakePath = Callable[[Schedule, int, Spacing | None], NoisePath]

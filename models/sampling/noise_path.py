"""The points that a sampling run passes: at which timesteps and noise levels the UNet is called.

Every function here whose name ends in _path takes (schedule, steps, spacing) and returns a NoisePath; a
sampler names the one that it was published with. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from models.sampling.schedule import Floats, Schedule, Timesteps
from models.spec import TimestepSpacing

LCM_TIMESTEPS = 50  # timesteps that a latent consistency model was distilled on (Luo et al. 2023)

# In place of an alpha_bar of 0 (zero terminal SNR). x / alpha then has a largest noise level, 4096, as in
# diffusers; samplers that work on x itself come much closer to 0, so that their results are those of 0.
SMALLEST_ALPHA_BAR = 2.0**-24
NEXT_TO_ZERO = 1e-16


@dataclass(frozen=True)
class NoisePath:
    """n points at which the UNet is called, where x = alpha x_0 + sigma eps, and the end point."""

    schedule: Schedule
    t: Floats  # (n,)
    alpha: Floats  # (n + 1,)
    sigma: Floats  # (n + 1,)

    def __len__(self) -> int:
        return len(self.t)

    @property
    def ratio(self) -> Floats:
        """(n + 1,): sigma / alpha, the noise of x / alpha; descending."""
        return self.sigma / self.alpha

    @property
    def inputs(self) -> Floats:
        """(n,): the timesteps as the UNet takes them; of noise levels, log(sigma) / 4."""
        spec = self.schedule.spec
        if not spec.sigma_range:
            return self.t
        logarithms: Floats = np.log(self.ratio[:-1] * spec.sigma_data) / 4
        return logarithms

    @property
    def log_snr(self) -> Floats:
        """(n + 1,): log(alpha / sigma), lambda in Lu et al. 2022; infinite where there is no noise."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def predicts_v(self) -> bool:
        """Whether the UNet predicts v."""
        return self.schedule.spec.prediction == "v_prediction"

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the schedule ends in pure noise."""
        return self.schedule.spec.zero_terminal_snr

    def last(self, count: int) -> NoisePath:
        """The last `count` points and the end."""
        first = len(self) - count
        return replace(self, t=self.t[first:], alpha=self.alpha[first:], sigma=self.sigma[first:])


def alpha_bar_of(schedule: Schedule, smallest: float = SMALLEST_ALPHA_BAR) -> Floats:
    """(T,): alpha_bar of every timestep; `smallest` where it is 0.

    A UNet that predicts eps cannot start from pure noise, whatever the sampler; it gets SMALLEST_ALPHA_BAR.
    """
    if not schedule.spec.zero_terminal_snr:
        return schedule.alpha_bar
    allowed = smallest if schedule.spec.prediction == "v_prediction" else SMALLEST_ALPHA_BAR
    return np.maximum(schedule.alpha_bar, allowed)


def schedule_path(schedule: Schedule, steps: int, spacing: TimestepSpacing | None) -> NoisePath:
    """The spacing's timesteps, ending at the schedule's own final alpha_bar."""
    t = schedule.timesteps(steps, spacing)
    return path_of_timesteps(schedule, t, schedule.final_alpha_bar, NEXT_TO_ZERO)


def pure_noise_path(schedule: Schedule, steps: int, spacing: TimestepSpacing | None) -> NoisePath:
    """The spacing's timesteps, ending at sigma = 0, for samplers that can start from pure noise."""
    return path_of_timesteps(schedule, schedule.timesteps(steps, spacing), 1.0, NEXT_TO_ZERO)


def zero_noise_path(schedule: Schedule, steps: int, spacing: TimestepSpacing | None) -> NoisePath:
    """The spacing's timesteps, ending at sigma = 0."""
    return path_of_timesteps(schedule, schedule.timesteps(steps, spacing))


def drop_last_path(schedule: Schedule, steps: int, spacing: TimestepSpacing | None) -> NoisePath:
    """The last of steps + 1 timesteps is dropped, and the run ends at sigma = 0 instead.

    DPM-Solver++ and UniPC were published so, for spacings whose last timestep has next to no noise.
    """
    drops = (spacing or schedule.spec.spacing) != "trailing" and 1 <= steps < len(schedule)
    t = schedule.timesteps(steps + 1, spacing)[:-1] if drops else schedule.timesteps(steps, spacing)
    return path_of_timesteps(schedule, t)


def path_of_timesteps(
    schedule: Schedule, t: Timesteps, final_alpha_bar: float = 1.0, smallest: float = SMALLEST_ALPHA_BAR
) -> NoisePath:
    """A path through whole timesteps. smallest: alpha_bar in place of 0."""
    ab = np.append(alpha_bar_of(schedule, smallest)[t], final_alpha_bar)
    return NoisePath(schedule, t.astype(np.float64), np.sqrt(ab), np.sqrt(1 - ab))


def interpolated_path(schedule: Schedule, steps: int, spacing: TimestepSpacing | None) -> NoisePath:
    """As zero_noise_path, but "linspace" keeps fractional timesteps and interpolates their noise."""
    if (spacing or schedule.spec.spacing) != "linspace":
        return zero_noise_path(schedule, steps, spacing)
    t = np.linspace(0, len(schedule) - 1, len(schedule.timesteps(steps, spacing)))[::-1]
    table = schedule_ratios(schedule)
    return path_of_ratios(schedule, t, np.interp(t, np.arange(len(table)), table))


def schedule_ratios(schedule: Schedule) -> Floats:
    """(T,), ascending: sigma / alpha of every timestep."""
    alpha_bar = alpha_bar_of(schedule)
    ratios: Floats = np.sqrt((1 - alpha_bar) / alpha_bar)
    return ratios


def timestep_of(schedule: Schedule, ratio: Floats) -> Floats:
    """The fractional timesteps of these sigma / alpha, interpolated in their logarithm."""
    table = schedule_ratios(schedule)
    return np.interp(np.log(ratio), np.log(table), np.arange(len(table)))


def path_of_ratios(schedule: Schedule, t: Floats, ratio: Floats) -> NoisePath:
    """A path given by sigma / alpha at its points, ending at sigma = 0."""
    alpha = 1 / np.sqrt(1 + ratio**2)
    return NoisePath(schedule, t, np.append(alpha, 1.0), np.append(ratio * alpha, 0.0))


def karras_ratios(high: float, low: float, steps: int) -> Floats:
    """Evenly spaced in ratio^(1/7) (Karras et al. 2022, equation 5)."""
    ramp = np.linspace(0, 1, steps)
    ratios: Floats = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return ratios


def exponential_ratios(high: float, low: float, steps: int) -> Floats:
    """Evenly spaced in log(ratio)."""
    return np.exp(np.linspace(np.log(high), np.log(low), steps))


def karras_path(schedule: Schedule, steps: int, spacing: TimestepSpacing | None) -> NoisePath:
    """karras_ratios between the spacing's first and last timestep, at fractional timesteps."""
    table, t = schedule_ratios(schedule), schedule.timesteps(steps, spacing)
    ratio = karras_ratios(table[t[0]], table[t[-1]], steps)
    return path_of_ratios(schedule, timestep_of(schedule, ratio), ratio)


def whole_karras_path(schedule: Schedule, steps: int, spacing: TimestepSpacing | None) -> NoisePath:
    """karras_ratios between the schedule's own ends, rounded to whole timesteps."""
    schedule.timesteps(steps, spacing)  # raises ValueError for steps outside the schedule
    table = schedule_ratios(schedule)
    ratio = karras_ratios(table[-1], table[0], steps)
    return path_of_ratios(schedule, np.round(timestep_of(schedule, ratio)), ratio)


def exponential_path(schedule: Schedule, steps: int, spacing: TimestepSpacing | None) -> NoisePath:
    """exponential_ratios between the spacing's first and last timestep, at fractional timesteps."""
    table, t = schedule_ratios(schedule), schedule.timesteps(steps, spacing)
    log_ratio = np.linspace(np.log(table[t[0]]), np.log(table[t[-1]]), steps)
    return path_of_ratios(
        schedule, np.interp(log_ratio, np.log(table), np.arange(len(table))), np.exp(log_ratio)
    )


def lcm_path(schedule: Schedule, steps: int, spacing: TimestepSpacing | None) -> NoisePath:
    """Timesteps among the LCM_TIMESTEPS of the distillation, or the spacing's.

    Raises ValueError for more steps than LCM_TIMESTEPS.
    """
    own = lcm_timesteps(schedule, steps, "lcm")
    t = schedule.timesteps(steps, spacing) if spacing else own
    return path_of_timesteps(schedule, t, smallest=NEXT_TO_ZERO)


def tcd_path(schedule: Schedule, steps: int, spacing: TimestepSpacing | None) -> NoisePath:
    """As lcm_path, but the run ends at timestep 0, not at sigma = 0."""
    t = lcm_timesteps(schedule, steps, "tcd")
    return path_of_timesteps(schedule, t, float(schedule.alpha_bar[0]), NEXT_TO_ZERO)


def lcm_timesteps(schedule: Schedule, steps: int, sampler: str) -> Timesteps:
    known = min(LCM_TIMESTEPS, len(schedule))
    if not 1 <= steps <= known:
        raise ValueError(f"steps must be 1 to {known} for {sampler}, not {steps}")
    distilled = (np.arange(1, known + 1) * (len(schedule) // known) - 1)[::-1]
    chosen = np.floor(np.linspace(0, known, steps, endpoint=False)).astype(np.int64)
    timesteps: Timesteps = distilled[chosen]
    return timesteps


MakePath = Callable[[Schedule, int, TimestepSpacing | None], NoisePath]

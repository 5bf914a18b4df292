"""The noise schedule: betas, alpha_bar, and which timesteps are visited. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from models.spec import ScheduleSpec, TimestepSpacing

Floats = NDArray[np.float64]
Timesteps = NDArray[np.int64]


class Schedule:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t) (Ho et al. 2020, equation 4)."""

    def __init__(self, spec: ScheduleSpec) -> None:
        self.spec = spec
        self.alpha_bar: Floats  # (T,)
        if spec.sigma_range:
            self.alpha_bar = 1 / (1 + noise_ratios(spec) ** 2)
            self.betas = 1 - self.alpha_bar / np.append(1.0, self.alpha_bar[:-1])  # (T,)
        else:
            self.betas = betas(spec)
            self.alpha_bar = np.cumprod(1.0 - self.betas, dtype=np.float64)

    def __len__(self) -> int:
        """T, the number of training timesteps."""
        return self.spec.timesteps

    @property
    def final_alpha_bar(self) -> float:
        """The alpha_bar at which the last step ends."""
        return 1.0 if self.spec.final_alpha_one else float(self.alpha_bar[0])

    def timesteps(self, steps: int, spacing: TimestepSpacing | None = None) -> Timesteps:
        """Exactly `steps` distinct timesteps, descending: (steps,).

        spacing: the schedule's own by default. Raises ValueError for steps outside 1..T.
        """
        total = self.spec.visited
        if not 1 <= steps <= total:
            raise ValueError(f"steps must be 1 to {total}, not {steps}")
        return TIMESTEP_SPACINGS[spacing or self.spec.spacing](steps, total, self.spec.steps_offset)


def noise_ratios(spec: ScheduleSpec) -> Floats:
    """sigma / alpha of each timestep, (T,), of a schedule of noise levels: evenly spaced in its 7th root.

    (Karras et al. 2022, equation 5.)
    """
    low, high = (sigma / spec.sigma_data for sigma in spec.sigma_range)
    ratios: Floats = np.linspace(low ** (1 / 7), high ** (1 / 7), spec.timesteps) ** 7
    return ratios


def betas(spec: ScheduleSpec) -> Floats:
    """The beta of each timestep, (T,). "scaled_linear", linear in sqrt(beta), is the LDM code's "linear"."""
    root = 0.5 if spec.beta_schedule == "scaled_linear" else 1.0
    values: Floats = np.linspace(spec.beta_start**root, spec.beta_end**root, spec.timesteps) ** (1 / root)
    return zero_terminal_snr(values) if spec.zero_terminal_snr else values


def zero_terminal_snr(values: Floats) -> Floats:
    """Betas with which sqrt(alpha_bar) ends at 0 and starts where it did (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(np.cumprod(1.0 - values))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    rescaled: Floats = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    return rescaled


def leading(steps: int, total: int, offset: int) -> Timesteps:
    """Multiples of the integer stride total // steps, plus the offset, as in the LDM code.

    If such multiples would not reach the last tenth of the timesteps, the steps are spread evenly instead.
    The offset is reduced if it would lead past the last timestep.
    """
    spread_evenly = total % steps > total // 10
    t = np.arange(steps, dtype=np.int64)
    t = t * total // steps if spread_evenly else t * (total // steps)
    return (t + min(offset, total - 1 - int(t[-1])))[::-1].copy()


def trailing(steps: int, total: int, offset: int) -> Timesteps:
    """Evenly spaced, starting at the last timestep (Lin et al. 2023, table 2)."""
    return np.round(total - np.arange(steps) * total / steps).astype(np.int64) - 1


def linspace(steps: int, total: int, offset: int) -> Timesteps:
    """Evenly spaced, from the last timestep to 0 (Lin et al. 2023, table 2)."""
    return np.round(np.linspace(0, total - 1, steps)).astype(np.int64)[::-1].copy()


TIMESTEP_SPACINGS: dict[TimestepSpacing, Callable[[int, int, int], Timesteps]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
}

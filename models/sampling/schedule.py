"""The noise schedule: betas, alpha_bar, and which timesteps are visited."""

from __future__ import annotations

import numpy as np

from models.spec import ScheduleSpec, Spacing


class Schedule:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t) (Ho et al. 2020, equation 4)."""

    def __init__(self, spec: ScheduleSpec) -> None:
        self.spec = spec
        self.betas = betas(spec)  # (T,) float64
        self.alpha_bar = np.cumprod(1.0 - self.betas)  # (T,) float64

    def __len__(self) -> int:
        """T, how many timesteps the table has."""
        return self.spec.timesteps

    @property
    def final_alpha_bar(self) -> float:
        """The alpha_bar that the last step goes to."""
        return 1.0 if self.spec.final_alpha_one else float(self.alpha_bar[0])

    def timesteps(self, steps: int, spacing: Spacing | None = None) -> np.ndarray:
        """Exactly `steps` distinct timesteps of the table, descending: (steps,) int64.

        spacing: the spec's own unless given. "leading" has the reference's whole stride, T // steps, unless
        that would leave out more than a tenth of the table, and drops as much of the offset as would leave
        the table; "trailing" starts at T - 1, and "linspace" ends at 0 too (Lin et al. 2023, table 2).
        Raises ValueError for steps outside 1..T.
        """
        if not 1 <= steps <= len(self):
            raise ValueError(f"steps must be 1 to {len(self)}, not {steps}")
        return SPACINGS[spacing or self.spec.spacing](steps, len(self), self.spec.steps_offset)


def betas(spec: ScheduleSpec) -> np.ndarray:
    """(T,) float64. "scaled_linear" is linear in sqrt(beta), which the LDM code calls linear."""
    if spec.beta_schedule == "scaled_linear":
        return np.linspace(spec.beta_start**0.5, spec.beta_end**0.5, spec.timesteps) ** 2
    return np.linspace(spec.beta_start, spec.beta_end, spec.timesteps)


def leading(steps: int, total: int, offset: int) -> np.ndarray:
    even = total % steps > total // 10  # at the latest from a tenth of T on, the stride itself is rough
    t = np.arange(steps, dtype=np.int64)  # integers: no rounding to go wrong
    t = t * total // steps if even else t * (total // steps)
    return (t + min(offset, total - 1 - int(t[-1])))[::-1].copy()


def trailing(steps: int, total: int, offset: int) -> np.ndarray:
    return np.round(total - np.arange(steps) * total / steps).astype(np.int64) - 1


def linspace(steps: int, total: int, offset: int) -> np.ndarray:
    return np.round(np.linspace(0, total - 1, steps)).astype(np.int64)[::-1].copy()


SPACINGS = {"leading": leading, "trailing": trailing, "linspace": linspace}

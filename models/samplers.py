"""Samplers as tables: plan() computes every coefficient ahead, one step() serves them all.

Free of torch at import, so that a process that only checks requests can know the samplers' names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from models.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

SAMPLERS = ("ddim",)
COLUMNS = ("t", "c_in", "a", "b", "s")  # x_next = a * x + b * eps + s * noise; the UNet sees c_in * x at t


@dataclass(frozen=True, eq=False)
class Plan:
    """One line of coefficients for each UNet evaluation of a run."""

    lines: np.ndarray  # (n, 5) float64, columns as in COLUMNS

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
        return self.lines[:, 4] > 0


def plan(schedule: Schedule, sampler: str, steps: int, eta: float = 0.0) -> Plan:
    """The table of a whole run of a sampler.

    eta: 0 is deterministic, 1 adds as much noise as DDPM. Raises ValueError for an unknown sampler, steps
    outside the schedule or eta outside [0, 1].
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; there is {', '.join(SAMPLERS)}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be 0 to 1, not {eta}")
    return Plan(ddim_lines(schedule, schedule.timesteps(steps), eta))


def ddim_lines(schedule: Schedule, t: np.ndarray, eta: float) -> np.ndarray:
    """Lines (n, 5) of DDIM over descending timesteps (Song et al. 2020, equations 12 and 16)."""
    ab_t = schedule.alpha_bar[t]
    ab_s = np.append(ab_t[1:], schedule.final_alpha_bar)  # each step goes to the next timestep visited
    sigma = eta * np.sqrt((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s))
    a = np.sqrt(ab_s / ab_t)
    towards_x_t = np.sqrt(np.maximum(1 - ab_s - sigma**2, 0.0))  # rounding may leave it just below 0
    b = towards_x_t - a * np.sqrt(1 - ab_t)
    return np.stack([t.astype(np.float64), np.ones_like(a), a, b, sigma], axis=1)


def step(x: Tensor, eps: Tensor, lines: Tensor, noise: Tensor | None = None) -> Tensor:
    """One update of every row by a line of its own, in float32.

    x, eps, noise: (B, C, h, w); lines: (B, 5). Without noise its term is left out, which is right only
    where every line has s = 0. -> (B, C, h, w) float32.
    """
    _, _, a, b, s = lines.float()[:, :, None, None, None].unbind(1)  # each (B, 1, 1, 1)
    x_next = a * x.float() + b * eps.float()
    return x_next if noise is None else x_next + s * noise.float()

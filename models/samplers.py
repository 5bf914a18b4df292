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
# x_next = a * x + b * eps + s * noise, where eps is the UNet's of c_in * x at t. A picture that is known
# stands at this point of the run at signal * z + sigma * noise (equation 4 of Ho et al. 2020).
COLUMNS = ("t", "c_in", "a", "b", "s", "signal", "sigma")


@dataclass(frozen=True, eq=False)
class Plan:
    """One line of coefficients for each UNet evaluation of a run.

    start: (signal, sigma) of what a run from a picture starts from; without one it starts from noise alone.
    """

    lines: np.ndarray  # (n, 7) float64, columns as in COLUMNS; signal and sigma are those after the step
    start: tuple[float, float]

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


def plan(schedule: Schedule, sampler: str, steps: int, eta: float = 0.0, strength: float = 1.0) -> Plan:
    """The table of a whole run of a sampler.

    eta: 0 is deterministic, 1 adds as much noise as DDPM. strength: a run from a picture takes this share of
    the steps, the last ones, and at least one (Meng et al. 2022, algorithm 1). Raises ValueError for an
    unknown sampler, steps outside the schedule, eta outside [0, 1] or strength outside (0, 1].
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; there is {', '.join(SAMPLERS)}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be 0 to 1, not {eta}")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
    taken = max(1, int(steps * strength + 1e-9))  # 0.58 of 50 is 29, though rounding says 28.999
    t = schedule.timesteps(steps)[steps - taken :]
    ab = float(schedule.alpha_bar[t[0]])
    return Plan(ddim_lines(schedule, t, eta), (ab**0.5, (1 - ab) ** 0.5))


def ddim_lines(schedule: Schedule, t: np.ndarray, eta: float) -> np.ndarray:
    """Lines (n, 7) of DDIM over descending timesteps (Song et al. 2020, equations 12 and 16)."""
    ab_t = schedule.alpha_bar[t]
    ab_s = np.append(ab_t[1:], schedule.final_alpha_bar)  # each step goes to the next timestep visited
    sigma = eta * np.sqrt((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s))
    a = np.sqrt(ab_s / ab_t)
    towards_x_t = np.sqrt(np.maximum(1 - ab_s - sigma**2, 0.0))  # rounding may leave it just below 0
    b = towards_x_t - a * np.sqrt(1 - ab_t)
    known = np.append(ab_t[1:], 1.0)  # what is known ends without noise, whatever the schedule ends at
    columns = (t.astype(np.float64), np.ones_like(a), a, b, sigma, np.sqrt(known), np.sqrt(1 - known))
    return np.stack(columns, axis=1)


def step(x: Tensor, eps: Tensor, lines: Tensor, noise: Tensor | None = None) -> Tensor:
    """One update of every row by a line of its own, in float32.

    x, eps, noise: (B, C, h, w); lines: (B, 7). Without noise its term is left out, which is right only
    where every line has s = 0. -> (B, C, h, w) float32.
    """
    _, _, a, b, s, _, _ = lines.float()[:, :, None, None, None].unbind(1)  # each (B, 1, 1, 1)
    x_next = a * x.float() + b * eps.float()
    return x_next if noise is None else x_next + s * noise.float()


def keep(x: Tensor, z: Tensor, noise: Tensor, mask: Tensor, lines: Tensor) -> Tensor:
    """Put back what is known after a step: inpainting by blending latents (Lugmayr et al. 2022, equation 8).

    x, z, noise: (B, C, h, w), z the known latent and noise what the run started from; mask: (B, 1, h, w), 1
    where the run may paint; lines: (B, 7). -> (B, C, h, w) float32.
    """
    signal, sigma = lines.float()[:, 5:, None, None, None].unbind(1)  # each (B, 1, 1, 1)
    return mask * x + (1 - mask) * (signal * z + sigma * noise)

"""The table of coefficients that a sampler is: one line for each UNet call. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from models.sampling.noise_path import NoisePath
from models.sampling.schedule import Floats

HISTORY = 3  # most latents of earlier steps that a sampler combines
TERMS = 1 + HISTORY + 1  # of a linear combination: x, the history, eps

# Columns of a line of coefficients. The UNet is called at T, where x = ALPHA x_0 + SIGMA eps; FRESH_NOISE is
# the factor of fresh noise; after the step the image's noise is that of NEXT_ALPHA and NEXT_SIGMA.
T, ALPHA, SIGMA, FRESH_NOISE, NEXT_ALPHA, NEXT_SIGMA = range(6)
COMBO_START = 6  # from here: 1 + HISTORY combinations of TERMS factors, for the next x and history

SMALLEST_ALPHA = 0.02  # below it, the lines of a schedule with zero terminal SNR count on v; see from_v()

Combination = Floats  # (TERMS,): factors of x, of the history, and of eps


@dataclass(frozen=True, eq=False)
class Plan:
    """A run of a sampler: one line of coefficients for each UNet evaluation.

    start: (alpha, sigma) of the noised image that an image-to-image run starts from.
    """

    coeffs: Floats  # (n, COMBO_START + (1 + HISTORY) * TERMS)
    start: tuple[float, float]
    history: int = 0  # latents beside x that the run keeps: 0 or HISTORY

    def __len__(self) -> int:
        """How many UNet evaluations the run takes."""
        return len(self.coeffs)

    def part(self, first: int, last: int) -> Plan:
        """The calls from number `first` to before number `last`, counted from 0."""
        return replace(self, coeffs=self.coeffs[first:last])

    @property
    def timesteps(self) -> Floats:
        """(n,), in the order of evaluation."""
        timesteps: Floats = self.coeffs[:, T]
        return timesteps

    @property
    def needs_noise(self) -> NDArray[np.bool_]:
        """(n,): which steps add fresh noise."""
        needed: NDArray[np.bool_] = self.coeffs[:, FRESH_NOISE] > 0
        return needed


X, *PAST, EPS = np.eye(TERMS)  # combinations of one term: x itself, one entry of the history, eps itself


def predicted_x_0(path: NoisePath, i: int) -> Combination:
    """x_0 as predicted at point i."""
    x_0: Combination = (X - path.sigma[i] * EPS) / path.alpha[i]
    return x_0


def build_plan(
    path: NoisePath,
    next_x: Sequence[Combination],
    fresh_noise: Floats | float,
    history: Sequence[Sequence[Combination]] | None = None,
) -> Plan:
    """A plan from the combinations that make each next x and each next history.

    path: one point for each UNet call. The noise level that masked images are restored at is 0 after the last
    step, whatever the path ends at.
    """
    n = len(path)
    coeffs = np.zeros((n, COMBO_START + (1 + HISTORY) * TERMS))
    coeffs[:, T], coeffs[:, ALPHA], coeffs[:, SIGMA] = path.inputs, path.alpha[:-1], path.sigma[:-1]
    coeffs[:, FRESH_NOISE] = fresh_noise
    coeffs[:, NEXT_ALPHA] = np.append(path.alpha[1:-1], 1.0)
    coeffs[:, NEXT_SIGMA] = np.append(path.sigma[1:-1], 0.0)
    combinations = coeffs[:, COMBO_START:].reshape(n, 1 + HISTORY, TERMS)
    combinations[:, 0] = next_x
    for index, kept in enumerate(history or []):
        for place, combination in enumerate(kept, 1):
            combinations[index, place] = combination
    if path.zero_terminal_snr and path.predicts_v:
        from_v(coeffs)
    return Plan(coeffs, (float(path.alpha[0]), float(path.sigma[0])), HISTORY if history else 0)


def from_v(coeffs: Floats) -> None:
    """Rewrite the lines whose alpha is next to 0, in place, so that float32 loses nothing there.

    The denoiser returns ALPHA v + SIGMA x. Near alpha = 0 that is x alone, and x_0 = -v is lost. With 1 for
    both columns it returns x + v, of which eps is (sigma - alpha) x + alpha (x + v). Then
    (x - SIGMA (x + v)) / ALPHA is still x_0, to within alpha.
    """
    lines = np.flatnonzero(coeffs[:, ALPHA] < SMALLEST_ALPHA)
    alpha, sigma = coeffs[lines, ALPHA, None], coeffs[lines, SIGMA, None]
    combinations = coeffs[lines, COMBO_START:].reshape(len(lines), 1 + HISTORY, TERMS)
    combinations[:, :, 0] += (sigma - alpha) * combinations[:, :, -1]
    combinations[:, :, -1] *= alpha
    coeffs[lines, COMBO_START:] = combinations.reshape(len(lines), (1 + HISTORY) * TERMS)
    coeffs[lines, ALPHA] = coeffs[lines, SIGMA] = 1.0

"""The update of a batch after a UNet call: every row with its own line of coefficients."""

from __future__ import annotations

from torch import Tensor

from models.sampling.table import COMBO_START, FRESH_NOISE, HISTORY, NEXT_ALPHA, TERMS


def step(state: Tensor, eps: Tensor, coeffs: Tensor, noise: Tensor | None = None) -> Tensor:
    """One sampler update of every row, in float32.

    state: (B, 1 + m, C, h, w), x and the history, m at least the `history` of every row's plan; eps, noise:
    (B, C, h, w); coeffs: (B, ...), one line of a plan for each row. noise may be None only if no line adds
    fresh noise. -> (B, 1 + m, C, h, w) float32.
    """
    count, coeffs = state.shape[1], coeffs.float()
    combinations = coeffs[:, COMBO_START:].unflatten(1, (1 + HISTORY, TERMS))[:, :count, :, None, None, None]
    out: Tensor = combinations[:, :, -1] * eps.float()[:, None]
    # The order of this sum is fixed, so that a row's bits do not depend on other rows' history.
    for term in range(count):
        out = out + combinations[:, :, term] * state[:, term : term + 1].float()
    if noise is not None:
        out[:, 0] += coeffs[:, FRESH_NOISE, None, None, None] * noise.float()
    return out


def blend_unmasked(x: Tensor, z: Tensor, noise: Tensor, mask: Tensor, coeffs: Tensor) -> Tensor:
    """Restore the given image outside the mask after a step (Lugmayr et al. 2022, equation 8).

    x: (B, C, h, w), after the step; z: (B, C, h, w), latent of the given image; noise: (B, C, h, w), that the
    run started from; mask: (B, 1, h, w), 1 where x is repainted; coeffs: as for step().
    -> (B, C, h, w) float32.
    """
    alpha, sigma = coeffs.float()[:, NEXT_ALPHA:COMBO_START, None, None, None].unbind(1)  # each (B, 1, 1, 1)
    return mask * x + (1 - mask) * (alpha * z + sigma * noise)

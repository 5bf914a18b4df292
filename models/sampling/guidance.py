"""Classifier-free guidance: the UNet rows that an image needs, and how their predictions are combined.

Imports no torch at run time, so that the queue can count rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cfg_rows(guidance_scale: float) -> slice:
    """Which of the rows (unconditional, conditional) an image needs.

    One row is enough at a scale of 0, the unconditional prediction, and of 1, the conditional one.
    """
    return {0.0: slice(0, 1), 1.0: slice(1, 2)}.get(guidance_scale, slice(0, 2))


def row_count(guidance_scale: float) -> int:
    """UNet rows that one image costs: 1 or 2."""
    return 1 if guidance_scale in (0.0, 1.0) else 2


def guide(eps_uncond: Tensor, eps_cond: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2021, equation 6, with scale = 1 + w).

    eps_uncond, eps_cond: (B, C, h, w); scale: one number for all images, or (B,). -> (B, C, h, w).
    """
    if not isinstance(scale, (int, float)):
        scale = scale[:, None, None, None]
    return eps_uncond + scale * (eps_cond - eps_uncond)

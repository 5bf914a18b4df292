"""Mixtures of noise."""

from __future__ import annotations

import torch
from torch import Tensor

NEARLY_EQUAL = 0.9995  # mean cosine above which two tensors count as equal
SMALLEST_SINE = 1e-6  # of an angle; below it the mixture is linear


def slerp(strength: float, low: Tensor, high: Tensor) -> Tensor:
    """Spherical interpolation from `low` (strength 0) to `high` (strength 1), both (C, h, w).

    As AUTOMATIC1111's web UI mixes the noise of two seeds: a vector is a column of the latent, so norms and
    angles are taken along the height.
    """
    unit_low, unit_high = (x / x.norm(dim=1, keepdim=True) for x in (low, high))
    cosine = (unit_low * unit_high).sum(dim=1, keepdim=True)  # (C, 1, w)
    linear = (1 - strength) * low + strength * high
    if cosine.mean() > NEARLY_EQUAL:
        return linear
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    mixed = ((1 - strength) * angle).sin() / sine * low + (strength * angle).sin() / sine * high
    return torch.where(sine < SMALLEST_SINE, linear, mixed)

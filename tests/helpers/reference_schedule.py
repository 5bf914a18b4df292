"""The schedule of the latent diffusion paper's code, in float64."""

from __future__ import annotations

import numpy as np


def their_alpha_bar(start, end):
    return np.cumprod(1 - np.linspace(start**0.5, end**0.5, 1000) ** 2)


def their_timesteps(count):
    """The visited timesteps, ascending."""
    return np.arange(0, 1000, 1000 // count) + 1

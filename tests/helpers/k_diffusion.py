"""The samplers of k-diffusion, written down from its sampling.py: the reference where `diffusers` has none.

All work on y = x / alpha at noise levels sigma (our sigma / alpha). Compared with k-diffusion 0.1.1 to 1e-12.
"""

import math
from itertools import pairwise

import numpy as np


class Brownian:
    """Noise for intervals of sigma, as increments of one Brownian motion (BrownianTreeNoiseSampler).

    noises: one for each level that is reached, in descending order.
    """

    def __init__(self, noises):
        self.noises = iter(noises)
        self.path = []  # (sigma, value)

    def __call__(self, start, end):
        if not self.path:
            self.path = [(start, 0.0)]
        lowest, value = self.path[-1]
        if end < lowest:
            self.path.append((end, value + math.sqrt(lowest - end) * next(self.noises)))
        values = dict(self.path)
        return (values[end] - values[start]) / math.sqrt(start - end)


def ancestral_step(start, end):
    up = min(end, math.sqrt(end**2 * (start**2 - end**2) / start**2))
    return math.sqrt(end**2 - up**2), up


def heun(denoise, y, sigmas, noise):
    for start, end in pairwise(sigmas):
        d = (y - denoise(y, start)) / start
        if end == 0:
            y = y + d * (end - start)
        else:
            y_2 = y + d * (end - start)
            d_2 = (y_2 - denoise(y_2, end)) / end
            y = y + (d + d_2) / 2 * (end - start)
        yield y


def lms(denoise, y, sigmas, noise):
    derivatives = []
    for i, start in enumerate(sigmas[:-1]):
        derivatives.append((y - denoise(y, start)) / start)
        order = min(i + 1, 4)
        for j in range(order):
            basis = np.poly1d([1.0])
            for k in range(order):
                if k != j:
                    basis *= np.poly1d([1.0, -sigmas[i - k]]) / (sigmas[i - j] - sigmas[i - k])
            integral = basis.integ()
            y = y + (integral(sigmas[i + 1]) - integral(start)) * derivatives[-1 - j]
        yield y


def dpm2(denoise, y, sigmas, noise):
    for start, end in pairwise(sigmas):
        d = (y - denoise(y, start)) / start
        if end == 0:
            y = y + d * (end - start)
        else:
            middle = math.sqrt(start * end)
            y_2 = y + d * (middle - start)
            y = y + (y_2 - denoise(y_2, middle)) / middle * (end - start)
        yield y


def dpm2_ancestral(denoise, y, sigmas, noise):
    for start, end in pairwise(sigmas):
        down, up = ancestral_step(start, end)
        d = (y - denoise(y, start)) / start
        if down == 0:
            y = y + d * (down - start)
        else:
            middle = math.sqrt(start * down)
            y_2 = y + d * (middle - start)
            y = y + (y_2 - denoise(y_2, middle)) / middle * (down - start) + noise(start, end) * up
        yield y


def dpmpp_sde(denoise, y, sigmas, noise):
    for start, end in pairwise(sigmas):
        denoised = denoise(y, start)
        if end == 0:
            y = denoised
        else:
            middle = math.sqrt(start * end)
            down, up = ancestral_step(start, middle)
            y_2 = down / start * y + (1 - down / start) * denoised + noise(start, middle) * up
            denoised_2 = denoise(y_2, middle)
            down, up = ancestral_step(start, end)
            y = down / start * y + (1 - down / start) * denoised_2 + noise(start, end) * up
        yield y


def dpmpp_2m_sde(denoise, y, sigmas, noise):
    before, h_before = None, None
    for start, end in pairwise(sigmas):
        denoised = denoise(y, start)
        if end == 0:
            y = denoised
        else:
            h = math.log(start / end)
            decayed = -math.expm1(-2 * h)
            y = end / start * math.exp(-h) * y + decayed * denoised
            if before is not None:
                y = y + decayed / 2 * h / h_before * (denoised - before)
            y = y + noise(start, end) * end * math.sqrt(decayed)
            h_before = h
        before = denoised
        yield y


def dpmpp_3m_sde(denoise, y, sigmas, noise):
    denoised_1, denoised_2, h_1, h_2 = None, None, None, None
    for start, end in pairwise(sigmas):
        denoised = denoise(y, start)
        if end == 0:
            y = denoised
        else:
            h = math.log(start / end)
            y = math.exp(-2 * h) * y - math.expm1(-2 * h) * denoised
            phi_2 = math.expm1(-2 * h) / (2 * h) + 1
            phi_3 = phi_2 / (2 * h) - 0.5
            if h_2 is not None:
                r0, r1 = h_1 / h, h_2 / h
                d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
                d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
                y = y + phi_2 * d1 - phi_3 * (d1_0 - d1_1) / (r0 + r1)
            elif h_1 is not None:
                y = y + phi_2 * (denoised - denoised_1) / (h_1 / h)
            y = y + noise(start, end) * end * math.sqrt(-math.expm1(-2 * h))
            h_1, h_2 = h, h_1
        denoised_1, denoised_2 = denoised, denoised_1
        yield y


SAMPLERS = {
    function.__name__: function
    for function in (heun, lms, dpm2, dpm2_ancestral, dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde)
}

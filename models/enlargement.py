"""Enlarged images: by bicubic interpolation, and corrected by the image that they were made from."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

SMOOTH_DETAIL = 3.5 / 127.5  # of pixels in [-1, 1]; areas with less local detail are called smooth


def resample(low: Tensor, factor: int) -> Tensor:
    """Images (B, 3, h, w) in about [-1, 1] -> (B, 3, f*h, f*w) in [-1, 1], by bicubic interpolation."""
    return interpolate(low, scale_factor=factor, mode="bicubic").clamp(-1, 1)


def follow_low_resolution(x: Tensor, low: Tensor) -> Tensor:
    """Large images x (B, 3, f*h, f*w), corrected by the images low (B, 3, h, w) that they were made from.

    Back projection first; then smooth areas of low become those of bicubic resampling, which restores them
    almost exactly.
    """
    detail = local_detail(low)
    share = interpolate(detail / (detail + SMOOTH_DETAIL**2), x.shape[-2:], mode="bilinear")
    bicubic = interpolate(low, x.shape[-2:], mode="bicubic", antialias=True)  # as Pillow resamples
    return bicubic + share * (back_project(x, low) - bicubic)


def local_detail(x: Tensor) -> Tensor:
    """Mean squared difference between pixels and their neighbourhood's mean, around each pixel.

    x (B, C, h, w) -> (B, 1, h, w); neighbourhoods are 3x3 pixels.
    """
    difference = (x - neighbourhood_mean(x)).square().mean(1, keepdim=True)
    return neighbourhood_mean(difference)


def neighbourhood_mean(x: Tensor) -> Tensor:
    """The mean of the 3x3 pixels around each pixel; edges are repeated outwards. x (B, C, h, w) -> same."""
    return avg_pool2d(pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def back_project(x: Tensor, low: Tensor) -> Tensor:
    """Large images x (B, 3, f*h, f*w), corrected so that they resampled are about low (B, 3, h, w).

    Adds the difference between low and the shrunk x, enlarged (Irani and Peleg 1991); both resamplings are
    bicubic with antialiasing.
    """
    size, small = x.shape[-2:], low.shape[-2:]
    shrunk = interpolate(x.contiguous(), small, mode="bicubic", antialias=True)
    return x + interpolate(low - shrunk, size, mode="bicubic", antialias=True)

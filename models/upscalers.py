"""How an image is enlarged between two passes of a model, without another model. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from PIL import Image


class LatentUpscaler(NamedTuple):
    """Interpolation of the latent. mode, antialias: of torch.nn.functional.interpolate."""

    mode: str
    antialias: bool = False


LATENT_UPSCALERS: Mapping[str, LatentUpscaler] = {
    "latent": LatentUpscaler("bilinear"),
    "latent_antialiased": LatentUpscaler("bilinear", antialias=True),
    "latent_bicubic": LatentUpscaler("bicubic"),
    "latent_bicubic_antialiased": LatentUpscaler("bicubic", antialias=True),
    "latent_nearest": LatentUpscaler("nearest"),
    "latent_nearest_exact": LatentUpscaler("nearest-exact"),
}
# Resampling of the decoded image, which is encoded again.
IMAGE_UPSCALERS: Mapping[str, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
UPSCALERS = (*LATENT_UPSCALERS, *IMAGE_UPSCALERS)


def covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size of an image of `size` that has its proportions and covers the target, (width, height) each."""
    (width, height), (wide, high) = size, target
    if width * high < wide * height:
        return wide, wide * height // width
    return high * width // height, high

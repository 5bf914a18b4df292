"""Inpainting as in A1111: the blurred mask, the region to repaint, and pasting the result into the original.

At the mask's blurred edge the repainted image fades into the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from service.api.a1111.resizing import resize

HALF = 128  # mask values from here on count as white
Region = tuple[int, int, int, int]  # left, upper, right, lower, in pixels


@dataclass(frozen=True, eq=False)
class MaskedImage:
    """An image (RGB) and its mask (L, same size): 255 marks pixels to repaint; blurred edges have less."""

    image: Image.Image
    mask: Image.Image

    @property
    def binary_mask(self) -> Image.Image:
        """The mask without blur: 255 marks pixels to repaint, 0 all others."""
        return self.mask.point([0] * HALF + [255] * (256 - HALF))

    def resized(self, width: int, height: int, mode: int = 0) -> MaskedImage:
        if self.image.size == (width, height):
            return self
        return MaskedImage(resize(self.image, width, height, mode), resize(self.mask, width, height, mode))

    def cropped(self, region: Region) -> MaskedImage:
        return MaskedImage(self.image.crop(region), self.mask.crop(region))

    def filled(self) -> Image.Image:
        """The image, with the masked pixels replaced by the colours around them."""
        return fill(self.image, np.asarray(self.binary_mask) > 0)


def read_mask(file: Image.Image, invert: bool, blur: tuple[int, int], rounded: bool = True) -> Image.Image:
    """A client's mask as L: its opacity if it has transparent pixels, else its brightness.

    blur: standard deviations in x and y, in pixels. rounded: opacity is rounded to 0 or 255.
    """
    alpha = file.convert("RGBA").getchannel("A") if file.has_transparency_data else None
    if alpha is None or alpha.getextrema() == (255, 255):
        mask = file.convert("L")
    else:
        mask = alpha.point([0] * (HALF + 1) + [255] * (255 - HALF)) if rounded else alpha
    mask = ImageOps.invert(mask) if invert else mask
    return mask.filter(ImageFilter.GaussianBlur(blur)) if any(blur) else mask


def region_of(mask: Image.Image, padding: int, width: int, height: int) -> Region:
    """The box around the mask with padding, widened to the proportions of width x height within the image."""
    left, upper, right, lower = mask.getbbox() or (0, 0, *mask.size)
    left, right = max(0, left - padding), min(mask.width, right + padding)
    upper, lower = max(0, upper - padding), min(mask.height, lower + padding)
    w, h = right - left, lower - upper
    if w * height < h * width:
        left, right = widened(left, right, round(h * width / height), mask.width)
    else:
        upper, lower = widened(upper, lower, round(w * height / width), mask.height)
    return left, upper, right, lower


def widened(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """The interval widened to `length` on both sides, within 0 and `limit`."""
    length = min(max(length, high - low), limit)
    start = min(max(0, (low + high - length) // 2), limit - length)
    return start, start + length


def paste_into(original: MaskedImage, region: Region | None) -> Callable[[Image.Image], Image.Image]:
    """A function that pastes a repainted region (None: the whole image) into the original."""
    left, upper, right, lower = region or (0, 0, *original.image.size)

    def paste(repainted: Image.Image) -> Image.Image:
        size = (right - left, lower - upper)
        if repainted.size != size:
            repainted = repainted.resize(size, Image.Resampling.LANCZOS)
        whole = original.image.copy()
        whole.paste(repainted, (left, upper), original.mask.crop((left, upper, right, lower)))
        return whole

    return paste


def fill(image: Image.Image, hole: np.ndarray) -> Image.Image:
    """The image, with its hole (H, W) filled from the pixels around it.

    Pixels outside the hole are averaged to half the size, repeatedly; the hole takes the enlarged averages.
    """
    if not hole.any() or hole.all():
        return image
    known = ~hole
    height, width = known.shape
    odd = ((0, height % 2), (0, width % 2))
    weights = np.pad(known, odd).astype(np.float64)
    colours = np.pad(np.asarray(image), (*odd, (0, 0))) * weights[..., None]
    count, total = sums_of_four(weights), sums_of_four(colours)
    small = Image.fromarray((total / np.maximum(count, 1)[..., None]).round().astype(np.uint8))
    large = fill(small, count == 0).resize((width, height), Image.Resampling.BILINEAR)
    return Image.composite(image, large, Image.fromarray((known * 255).astype(np.uint8)))


def sums_of_four(values: np.ndarray) -> np.ndarray:
    """Sums of squares of 2 x 2 pixels: (2h, 2w, ...) -> (h, w, ...)."""
    rows = values[::2] + values[1::2]
    sums: np.ndarray = rows[:, ::2] + rows[:, 1::2]
    return sums

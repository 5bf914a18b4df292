"""Inpainting: the blurred mask, outpainting, the region to repaint, and pasting it into the original image.

At the mask's blurred edge the repainted image fades into the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from service.requests.images import Pixels

HALF = 128  # mask values from here on count as white
Region = tuple[int, int, int, int]  # left, upper, right, lower, in pixels


@dataclass(frozen=True, eq=False)
class MaskedImage:
    """An image (RGB) and its mask (L, same size): 255 marks pixels to repaint; blurred edges have less."""

    image: Image.Image
    mask: Image.Image

    @property
    def binary_mask(self) -> Image.Image:
        """The mask without blur: 255 marks pixels to repaint, 0 all others; white if it would be empty."""
        binary = self.mask.point([0] * HALF + [255] * (256 - HALF))
        return binary if binary.getbbox() else Image.new("L", self.mask.size, 255)

    def resized(self, width: int, height: int) -> MaskedImage:
        if self.image.size == (width, height):
            return self
        size, method = (width, height), Image.Resampling.LANCZOS
        return MaskedImage(self.image.resize(size, method), self.mask.resize(size, method))

    def cropped(self, region: Region) -> MaskedImage:
        return MaskedImage(self.image.crop(region), self.mask.crop(region))

    def filled(self) -> Image.Image:
        """The image, with the masked pixels replaced by the colours around them."""
        return fill(self.image, np.asarray(self.binary_mask) > 0)


@dataclass(frozen=True, eq=False)
class Paste:
    """Where a repainted image belongs: in a region of the original, or with None in all of it."""

    original: MaskedImage
    region: Region | None = None

    def into(self, repainted: Pixels) -> Pixels:
        """The original image, with the repainted pixels where its mask is white: (H, W, 3)."""
        left, upper, right, lower = self.region or (0, 0, *self.original.image.size)
        size, part = (right - left, lower - upper), Image.fromarray(repainted)
        if part.size != size:
            part = part.resize(size, Image.Resampling.LANCZOS)
        whole = self.original.image.copy()
        whole.paste(part, (left, upper), self.original.mask.crop((left, upper, right, lower)))
        return np.asarray(whole)


def blurred(mask: Image.Image, radius: int) -> Image.Image:
    """The mask with an edge of a Gaussian whose standard deviation is `radius` pixels."""
    return mask.filter(ImageFilter.GaussianBlur(radius)) if radius else mask


def extended(masked: MaskedImage, sides: Sequence[int], blur: int) -> MaskedImage:
    """A larger image whose new pixels are masked; they have the colour of the nearest edge.

    sides: pixels to add at the left, at the top, at the right and at the bottom. With `blur` the mask fades
    out on the old pixels only, so that no copied pixel is visible.
    """
    left, top, right, bottom = sides
    pad = ((top, bottom), (left, right))
    image = Image.fromarray(np.pad(np.asarray(masked.image), (*pad, (0, 0)), mode="edge"))
    new = Image.fromarray(np.pad(np.zeros(masked.image.size[::-1], np.uint8), pad, constant_values=255))
    # Half of the Gaussian is on each side of an edge, so twice its values are 255 at the edge.
    new = ImageChops.lighter(new, blurred(new, blur).point([min(255, 2 * value) for value in range(256)]))
    old = Image.fromarray(np.pad(np.asarray(masked.mask), pad))
    return MaskedImage(image, ImageChops.lighter(new, old))


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

"""What AUTOMATIC1111 does around inpainting: which region is painted, at which size, and how it is put back.

The mask's edge is blurred; the painted picture shows through it, the original behind.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

HALF = 128
Region = tuple[int, int, int, int]  # left, upper, right, lower, in pixels


@dataclass(frozen=True, eq=False)
class Masked:
    """picture: RGB; soft: L, of its size, 255 where it is painted anew and less at a blurred edge."""

    picture: Image.Image
    soft: Image.Image

    @property
    def hole(self) -> Image.Image:
        """255 where it is painted anew, else 0."""
        return self.soft.point([0] * HALF + [255] * (256 - HALF))

    def resized(self, width: int, height: int) -> Masked:
        size = (width, height)
        if self.picture.size == size:
            return self
        how = Image.Resampling.LANCZOS
        return Masked(self.picture.resize(size, how), self.soft.resize(size, how))

    def cropped(self, region: Region) -> Masked:
        return Masked(self.picture.crop(region), self.soft.crop(region))

    def filled(self) -> Image.Image:
        """The picture with the colours around the hole in it."""
        return fill(self.picture, np.asarray(self.hole) > 0)


def soft_mask(picture: Image.Image, invert: bool, blur: int) -> Image.Image:
    """L, from a client's mask: what is opaque, if some of it is not, else what is white."""
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    if alpha is not None and alpha.getextrema() != (255, 255):
        mask = alpha.point([0] * (HALF + 1) + [255] * (255 - HALF))
    else:
        mask = picture.convert("L")
    mask = ImageOps.invert(mask) if invert else mask
    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask


def region_of(soft: Image.Image, padding: int, width: int, height: int) -> Region:
    """Around all that is not black, with the proportions of width x height as far as there is room."""
    left, upper, right, lower = soft.getbbox() or (0, 0, *soft.size)
    left, right = max(0, left - padding), min(soft.width, right + padding)
    upper, lower = max(0, upper - padding), min(soft.height, lower + padding)
    wide, high = right - left, lower - upper
    if wide * height < high * width:
        left, right = widened(left, right, round(high * width / height), soft.width)
    else:
        upper, lower = widened(upper, lower, round(wide * height / width), soft.height)
    return left, upper, right, lower


def widened(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """The interval about the same middle, of `length` or as much as fits between 0 and the limit."""
    length = min(max(length, high - low), limit)
    start = min(max(0, (low + high - length) // 2), limit - length)
    return start, start + length


def put_back(original: Masked, region: Region | None) -> Callable[[Image.Image], Image.Image]:
    """What makes the whole picture of a painted one: of its region, or of all of it."""
    left, upper, right, lower = region or (0, 0, *original.picture.size)

    def paste(painted: Image.Image) -> Image.Image:
        size = (right - left, lower - upper)
        if painted.size != size:
            painted = painted.resize(size, Image.Resampling.LANCZOS)
        whole = original.picture.copy()
        whole.paste(painted, (left, upper), original.soft.crop((left, upper, right, lower)))
        return whole

    return paste


def fill(picture: Image.Image, hole: np.ndarray) -> Image.Image:
    """The hole (H, W) from what is around it: means of known pixels at halved sizes, made larger again."""
    if not hole.any() or hole.all():
        return picture
    known = ~hole
    height, width = known.shape
    odd = ((0, height % 2), (0, width % 2))
    weights = np.pad(known, odd).astype(np.float64)
    colours = np.pad(np.asarray(picture), (*odd, (0, 0))) * weights[..., None]
    count, total = fours(weights), fours(colours)
    small = Image.fromarray((total / np.maximum(count, 1)[..., None]).round().astype(np.uint8))
    large = fill(small, count == 0).resize((width, height), Image.Resampling.BILINEAR)
    return Image.composite(picture, large, Image.fromarray((known * 255).astype(np.uint8)))


def fours(values: np.ndarray) -> np.ndarray:
    """Sums of 2 x 2: (2h, 2w, ...) -> (h, w, ...)."""
    rows = values[::2] + values[1::2]
    return rows[:, ::2] + rows[:, 1::2]


def png_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png", compress_level=1)
    return file.getvalue()

"""A1111's masks: their opacity or brightness, inverted and blurred on request."""

from __future__ import annotations

from PIL import Image, ImageFilter, ImageOps

from service.requests.inpainting import HALF


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

"""A1111's resize modes, for sizes of other proportions than the image."""

from __future__ import annotations

from PIL import Image

STRETCH, CROP, FILL = range(3)


def resize(image: Image.Image, width: int, height: int, mode: int = STRETCH) -> Image.Image:
    """The image at width x height: stretched, cropped, or with its outermost pixels repeated on two sides."""
    if mode == STRETCH or image.width * height == image.height * width:
        return image.resize((width, height), Image.Resampling.LANCZOS)
    wider = image.width * height > image.height * width
    if wider == (mode == CROP):
        size = max(1, image.width * height // image.height), height
    else:
        size = width, max(1, image.height * width // image.width)
    resized = image.resize(size, Image.Resampling.LANCZOS)
    left, upper = width // 2 - size[0] // 2, height // 2 - size[1] // 2
    if mode == CROP:
        canvas = Image.new(image.mode, (width, height))
        canvas.paste(resized, (left, upper))
        return canvas
    return surrounded(resized, left, upper, width, height)


def surrounded(image: Image.Image, left: int, upper: int, width: int, height: int) -> Image.Image:
    """A canvas of width x height with the image at (left, upper); its outermost pixels fill the rest."""
    canvas = Image.new(image.mode, (width, height))
    right, lower = left + image.width, upper + image.height
    for x, y, w, h, edge in (
        (0, 0, left, height, (0, 0, 1, image.height)),
        (right, 0, width - right, height, (image.width - 1, 0, image.width, image.height)),
        (0, 0, width, upper, (0, 0, image.width, 1)),
        (0, lower, width, height - lower, (0, image.height - 1, image.width, image.height)),
    ):
        if w > 0 and h > 0:
            canvas.paste(image.crop(edge).resize((w, h), Image.Resampling.NEAREST), (x, y))
    canvas.paste(image, (left, upper))
    return canvas

"""Images for tests: random ones, their files, and PSNR."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
MASK = np.zeros((64, 64), np.uint8)
MASK[20:41, 30:50] = 255


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """An image of random pixels, which no lossy format reproduces exactly."""
    channels = len(mode) if mode != "L" else 1
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)


def hole(size: tuple[int, int]) -> Image.Image:
    """A mask with a white rectangle in it."""
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    return mask


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The image as a file of this format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def base64_of(image: Image.Image | bytes, kind: str = "PNG", **options) -> str:
    """An image, or the bytes of a file, in base64."""
    file = image if isinstance(image, bytes) else file_of(image, kind, **options)
    return base64.b64encode(file).decode()


def png(pixels: np.ndarray) -> str:
    """Pixels as the base64 of a PNG file."""
    return base64_of(Image.fromarray(pixels))


def psnr(a: np.ndarray | bytes, b: np.ndarray | bytes) -> float:
    """Peak signal-to-noise ratio in dB of two images, as uint8 arrays or bytes; 99 if they are equal."""
    x, y = (np.frombuffer(v, np.uint8) if isinstance(v, bytes) else v for v in (a, b))
    error = np.mean((x.astype(float) - y.astype(float)) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)

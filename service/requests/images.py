"""Decodes images of clients (files, base64) to 8-bit pixels, and encodes pixels as PNG, JPEG and WebP."""

from __future__ import annotations

import base64
import io
import re
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import InvalidRequest
from service.requests import image_files
from service.requests.metadata import NONE, Metadata, save_options

Format = Literal["png", "jpeg", "webp"]
Pixels = npt.NDArray[np.uint8]
ImageSource = str | bytes | Image.Image  # base64 or a data: URL; a file; pixels

MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
FORMAT_OF_MEDIA_TYPE: dict[str, Format] = {media_type: kind for kind, media_type in MEDIA_TYPES.items()}
SUFFIXES: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
MAX_SIDE_OF_FORMAT: dict[Format, int] = {"jpeg": 65_500, "webp": 16_383}  # pixels
SAVE_OPTIONS: dict[Format, dict[str, Any]] = {
    "png": {"compress_level": 1},  # level 6 takes five times as long and saves a tenth of the size
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 4},
}

DATA_URL = re.compile(r"data:[\w/+.;=-]{0,200};base64,", re.IGNORECASE)
WHITESPACE = b" \t\r\n\v\f"
WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)
MASK_THRESHOLD = 128
# A progressive JPEG is decoded once for each of its scans, so a small file could take minutes.
START_OF_SCAN, MAX_SCANS = b"\xff\xda", 32
MAX_SIDE = 2**16 - 1  # pixels; images of one pixel per row would take long, too


def encode(pixels: Pixels, kind: Format, metadata: Metadata = NONE, quality: int | None = None) -> bytes:
    """A file of (H, W, 3) pixels. quality: 1 to 100, of a JPEG or WebP file."""
    options = SAVE_OPTIONS[kind] | save_options(kind, metadata)
    if quality is not None and "quality" in options:
        options["quality"] = quality
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def read_image(source: ImageSource, param: str, max_pixels: int) -> Image.Image:
    """The image of field `param` as 8-bit RGB. Raises InvalidRequest.

    Transparent pixels become white, 16-bit values keep their upper 8 bits, colour profiles are not applied.
    """
    return flatten(open_source(source, param, max_pixels), WHITE)


def read_mask(source: ImageSource, param: str, max_pixels: int) -> Image.Image:
    """The mask of field `param`: 255 where it is at least half white, else 0. Raises InvalidRequest.

    Transparent pixels count as black, so that white paint on a transparent background is a mask.
    """
    grey = flatten(open_source(source, param, max_pixels), BLACK).convert("L")
    return grey.point([0] * MASK_THRESHOLD + [255] * (256 - MASK_THRESHOLD))


def open_source(source: ImageSource, param: str, max_pixels: int) -> Image.Image:
    """The image of field `param`, upright and otherwise unchanged. Raises InvalidRequest."""
    if isinstance(source, Image.Image):
        check_size(source, param, max_pixels)
        return source
    return decode(from_base64(source, param) if isinstance(source, str) else source, param, max_pixels)


def from_base64(text: str, param: str) -> bytes:
    """The bytes of base64, which may contain white space, or of a data: URL. Raises InvalidRequest."""
    start = DATA_URL.match(text)
    try:
        characters = text[start.end() if start else 0 :].encode("ascii")
        return base64.b64decode(characters.translate(None, WHITESPACE), validate=True)
    except ValueError:
        raise InvalidRequest(f"{param} must be base64 or a data: URL with base64", param=param) from None


def decode(file: bytes, param: str, max_pixels: int) -> Image.Image:
    """The upright image of a PNG, JPEG or WebP file; its size is checked before pixels are decoded.

    Raises InvalidRequest.
    """
    try:
        file = image_files.essentials(file)
        with Image.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP")) as image:
            check_size(image, param, max_pixels)
            if image.format == "JPEG" and file.count(START_OF_SCAN) > MAX_SCANS:
                raise InvalidRequest(f"{param} must have at most {MAX_SCANS} scans", param=param)
            return ImageOps.exif_transpose(image)
    except InvalidRequest:
        raise
    except image_files.AnimatedError:
        raise InvalidRequest(f"{param} must be one image; this one is animated", param=param) from None
    except image_files.TooManyPartsError:
        raise InvalidRequest(f"{param} must be a file with fewer parts", param=param) from None
    except UnidentifiedImageError:
        raise InvalidRequest(f"{param} must be a PNG, JPEG or WebP file", param=param) from None
    except Image.DecompressionBombError:
        raise InvalidRequest(f"{param} must have at most {max_pixels} pixels", param=param) from None
    except Exception:  # Pillow raises errors of any type for a broken file
        raise InvalidRequest(f"{param} must be a complete file; this one is broken", param=param) from None


def check_size(image: Image.Image, param: str, max_pixels: int) -> None:
    """Raise InvalidRequest for an image with more than max_pixels pixels, or with a side over MAX_SIDE."""
    width, height = image.size
    if width * height > max_pixels:
        expected = f"must have at most {max_pixels} pixels, not {width}x{height}"
        raise InvalidRequest(f"{param} {expected}", param=param)
    if max(width, height) > MAX_SIDE:
        raise InvalidRequest(f"{param} must have sides of at most {MAX_SIDE} pixels", param=param)


def flatten(image: Image.Image, background: tuple[int, int, int, int]) -> Image.Image:
    """The image as 8-bit RGB, with transparent pixels blended onto the background."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow itself cuts 16-bit colours to their upper 8 bits
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        front = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", front.size, background), front)
    return image.convert("RGB")


def extend(image: Image.Image, width: int, height: int) -> bytes:
    """The pixels of a larger canvas with the image at the upper left, its last row and column repeated."""
    pixels = np.asarray(image)
    missing = ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]))
    return np.pad(pixels, missing + ((0, 0),) * (pixels.ndim - 2), mode="edge").tobytes()

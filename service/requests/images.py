"""Pictures in and out: clients' files and base64 -> uint8 pictures -> PNG, JPEG, WebP."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from service.errors import InvalidRequest

Format = Literal["png", "jpeg", "webp"]

MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
MOST_SIDE: dict[Format, int] = {"jpeg": 65_500, "webp": 16_383}  # pixels that a side may have
OPTIONS: dict[Format, dict[str, Any]] = {
    "png": {"compress_level": 1},  # 6 takes five times as long for a tenth of the size
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 4},
}

DATA_URL = re.compile(r"data:[\w/+.;=-]*;base64,", re.IGNORECASE)
WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)
HALF = 128
# A progressive JPEG is decoded once for each of its scans: a small file can hold work for hours.
SCAN, MOST_SCANS = b"\xff\xda", 100


def encode(pixels: bytes, width: int, height: int, kind: Format, parameters: Mapping[str, Any]) -> bytes:
    """A file of height x width x 3 bytes; a PNG carries `parameters` as JSON in a text chunk."""
    picture = Image.frombytes("RGB", (width, height), pixels)
    options = dict(OPTIONS[kind])
    if kind == "png":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("parameters", json.dumps(parameters))
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def read_picture(text: str, param: str, max_pixels: int) -> Image.Image:
    """The picture of field `param` as 8-bit RGB. Raises InvalidRequest.

    What is transparent shows white; of 16 bits the upper 8 stay; colour profiles are not applied.
    """
    return flatten(decode(from_base64(text, param), param, max_pixels), WHITE)


def read_mask(text: str, param: str, max_pixels: int) -> Image.Image:
    """The mask of field `param`: 255 where it is at least half white, else 0. Raises InvalidRequest.

    What is transparent counts as black, so that white paint on a transparent ground is a mask.
    """
    grey = flatten(decode(from_base64(text, param), param, max_pixels), BLACK).convert("L")
    return grey.point([0] * HALF + [255] * (256 - HALF))


def from_base64(text: str, param: str) -> bytes:
    """The bytes of base64, broken into lines or not, or of a data: URL. Raises InvalidRequest."""
    start = DATA_URL.match(text)
    try:
        return base64.b64decode("".join(text[start.end() if start else 0 :].split()), validate=True)
    except ValueError:
        raise InvalidRequest(f"{param} must be in base64 or a data: URL of that", param=param) from None


def decode(file: bytes, param: str, max_pixels: int) -> Image.Image:
    """The upright picture of a file of ours, its size checked before a pixel is decoded."""
    try:
        with Image.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP")) as picture:
            check(picture, param, max_pixels)
            if picture.format in ("JPEG", "MPO") and file.count(SCAN) > MOST_SCANS:
                raise InvalidRequest(f"{param} must have at most {MOST_SCANS} scans", param=param)
            return ImageOps.exif_transpose(picture)
    except InvalidRequest:
        raise
    except UnidentifiedImageError:
        raise InvalidRequest(f"{param} must be a PNG, JPEG or WebP file", param=param) from None
    except Image.DecompressionBombError:
        raise InvalidRequest(f"{param} must have at most {max_pixels} pixels", param=param) from None
    except Exception:  # Pillow raises anything at all for a broken file
        raise InvalidRequest(f"{param} must be a whole file; this one is broken", param=param) from None


def check(picture: Image.Image, param: str, max_pixels: int) -> None:
    """Raise InvalidRequest for a picture whose header says too much."""
    width, height = picture.size
    if width * height > max_pixels:
        raise InvalidRequest(
            f"{param} must have at most {max_pixels} pixels, not {width}x{height}", param=param
        )
    # A photograph with previews of itself inside (MPO) counts its frames, but is no animation.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise InvalidRequest(f"{param} must be one picture; this one is animated", param=param)


def flatten(picture: Image.Image, ground: tuple[int, int, int, int]) -> Image.Image:
    """As 8-bit RGB, in front of a ground where it is transparent."""
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow cuts colours of 16 bits to their upper 8 itself
        picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        front = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", front.size, ground), front)
    return picture.convert("RGB")


def grow(picture: Image.Image, width: int, height: int) -> bytes:
    """The pixels of a canvas with the picture at its upper left; its last row and column fill the rest."""
    pixels = np.asarray(picture)
    missing = ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]))
    return np.pad(pixels, missing + ((0, 0),) * (pixels.ndim - 2), mode="edge").tobytes()

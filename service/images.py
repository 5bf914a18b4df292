"""uint8 pictures -> PNG, JPEG, WebP and base64."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

Format = Literal["png", "jpeg", "webp"]

MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
OPTIONS: dict[Format, dict[str, Any]] = {
    "png": {"compress_level": 1},  # 6 takes five times as long for a tenth of the size
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 4},
}


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

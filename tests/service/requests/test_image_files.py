"""Hostile image files: each is read or refused in well under a second."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from service.errors import InvalidRequest
from service.requests.image_files import essentials
from service.requests.images import decode
from tests.helpers.images import file_of, noise

SIZE = 24 * 2**20  # bytes of the largest file that fits in a body of the default limit
MAX_PIXELS = 2**24
SECONDS = 3.0  # for what takes a tenth of that on an idle machine
ORIENTATION = 0x0112
JPEG = file_of(noise(8, 8), "JPEG")
WEBP = file_of(noise(8, 8), "WEBP", lossless=True)[12:]


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 8, height: int = 8, after: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((width + 1) * height)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + after + chunk(b"IEND")


def jpeg(segments: bytes) -> bytes:
    return JPEG[:2] + segments + JPEG[2:]


def segment(marker: int, data: bytes = b"") -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def webp(*chunks: bytes, size: int = 8, flags: int = 0) -> bytes:
    header = bytes([flags, 0, 0, 0]) + 2 * struct.pack("<I", size - 1)[:3]
    body = b"WEBP" + webp_chunk(b"VP8X", header) + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return kind + struct.pack("<I", len(data)) + data


def exif(size: int) -> bytes:
    """Exif data whose many tags each claim all of it."""
    count = min(65_000, size // 12 - 10)
    tags = b"".join(struct.pack(">HHII", 0x8000 + i % 0x7000, 7, size - 100, 8) for i in range(count))
    return (b"MM\0*\0\0\0\x08" + struct.pack(">H", count) + tags).ljust(size, b"\0")


def progressive(scans: int) -> bytes:
    """A progressive JPEG of the largest size that repeats its last scan."""
    file = file_of(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    last = file[file.rindex(b"\xff\xda") : -2]
    return file[:-2] + last * (scans - file.count(b"\xff\xda")) + file[-2:]


def bomb(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


FRAME = webp_chunk(b"ANMF", bytes(6) + 2 * struct.pack("<I", 7)[:3] + b"\1\0\0\0" + WEBP)
HOSTILE: dict[str, Callable[[], bytes]] = {
    "PNG of empty text chunks": lambda: png(chunk(b"tEXt", b"a\0") * (SIZE // 14)),
    "PNG of empty text chunks at its end": lambda: png(after=chunk(b"tEXt", b"a\0") * (SIZE // 14)),
    "PNG of unknown chunks": lambda: png(chunk(b"abCd") * (SIZE // 12)),
    "PNG of empty pixel chunks": lambda: png(chunk(b"IDAT") * (SIZE // 12)),
    "PNG of compressed texts": lambda: png(*[chunk(b"zTXt", b"%d\0\0" % i + bomb(10**6)) for i in range(99)]),
    "PNG with a large compressed text": lambda: png(chunk(b"zTXt", b"a\0\0" + bomb(2**26))),
    "PNG with a large international text": lambda: png(chunk(b"iTXt", b"a\0\1\0\0\0" + bomb(2**26))),
    "PNG with a large colour profile": lambda: png(chunk(b"iCCP", b"a\0\0" + bomb(2**26))),
    "PNG whose pixels unpack to too much": lambda: png(chunk(b"IDAT", bomb(2**26))),
    "PNG of one column": lambda: png(width=1, height=MAX_PIXELS),
    "PNG of large Exif data": lambda: png(chunk(b"eXIf", exif(SIZE))),
    "PNG of small Exif data": lambda: png(chunk(b"eXIf", exif(60_000))),
    "PNG animation": lambda: png(
        chunk(b"acTL", struct.pack(">II", 10**5, 0)), chunk(b"fcTL", bytes(26)) * 10**5
    ),
    "JPEG of empty comments": lambda: jpeg(segment(0xFE) * (SIZE // 4)),
    "JPEG of empty application segments": lambda: jpeg(segment(0xE3) * (SIZE // 4)),
    "JPEG of fill bytes": lambda: jpeg(b"\xff" * SIZE),
    "JPEG of escaped bytes": lambda: jpeg(b"\xff\0" * (SIZE // 2)),
    "JPEG of Photoshop data": lambda: jpeg(
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM".ljust(12, b"\0") * 5000) * 400
    ),
    "JPEG of Exif data": lambda: jpeg(segment(0xE1, b"Exif\0\0" + exif(60_000)) * 400),
    "JPEG of many scans": lambda: progressive(500),
    "WebP animation": lambda: webp(webp_chunk(b"ANIM", bytes(6)), FRAME * 50_000, flags=2),
    "WebP of empty chunks": lambda: webp(webp_chunk(b"abcd") * (SIZE // 8), WEBP),
    "WebP of large Exif data": lambda: webp(WEBP, webp_chunk(b"EXIF", exif(SIZE)), flags=8),
    "WebP of a huge canvas": lambda: webp(WEBP, size=2**24),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_read_or_refused_at_once(make):
    file = make()
    begin = time.monotonic()
    with suppress(InvalidRequest):
        assert decode(file, "image", MAX_PIXELS).size == (8, 8)
    assert time.monotonic() - begin < SECONDS


def saved(kind: str, image: Image.Image, **options) -> bytes:
    """A file with metadata of every kind."""
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    return file_of(image, kind, exif=tags, icc_profile=b"profile" * 1000, **options)


@pytest.mark.parametrize(
    "file",
    [
        saved("PNG", noise(9, 5, "RGBA"), dpi=(300, 300)),
        saved("PNG", noise(9, 5).quantize(8), transparency=3),
        saved("JPEG", noise(9, 5), comment=b"c" * 5000, dpi=(300, 300)),
        saved("JPEG", noise(9, 5).convert("CMYK"), progressive=True),
        saved("JPEG", noise(9, 5, "L")),
        saved("WEBP", noise(9, 5, "RGBA"), xmp=b"<xmp/>"),
        saved("WEBP", noise(9, 5), lossless=True),
    ],
)
def test_pixels_and_orientation_stay_without_the_rest(file):
    smaller = essentials(file)
    assert len(smaller) < len(file)
    with Image.open(io.BytesIO(file)) as whole, Image.open(io.BytesIO(smaller)) as reduced:
        assert (whole.mode, whole.getexif()[ORIENTATION]) == (reduced.mode, reduced.getexif()[ORIENTATION])
        assert (np.asarray(whole) == np.asarray(reduced)).all()


def test_the_parameters_in_a_png_can_still_be_read():
    text = chunk(b"tEXt", b"parameters\0a cat")
    assert decode(png(text), "image", 100).info["parameters"] == "a cat"

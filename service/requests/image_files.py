"""Reduces a client's image file to the parts that decide its pixels and a little metadata, for the decoder.

A small file can contain millions of empty parts, or metadata that take minutes to read. Here the number of
parts is limited and each takes the same time. All other checks of the file are left to the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_PARTS = 20_000  # PNG chunks, JPEG segments before the first scan, WebP chunks
MAX_TEXTS = 100  # text chunks that are kept
MAX_METADATA_BYTES = 2**16  # of Exif data that are kept

PNG_SIGNATURE, JPEG_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")

JPEG_MARKER = re.compile(rb"\xff+([^\xff\x00])")
JPEG_ALONE = {0x01, *range(0xD0, 0xDA)}  # markers without content
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
JPEG_PIXELS = {0xDB, 0xDD, *range(0xC0, 0xD0)}  # tables, frames, restart interval
JFIF, EXIF, ADOBE = 0xE0, 0xE1, 0xEE
EXIF_HEADER = b"Exif\0\0"

WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
WEBP_ICC_AND_XMP, WEBP_EXIF = 0x20 | 0x04, 0x08  # flags of VP8X


class TooManyPartsError(ValueError):
    """The file has more parts than any real image."""


class AnimatedError(ValueError):
    """The file has more than one frame."""


def essentials(file: bytes) -> bytes:
    """A PNG, JPEG or WebP file without unnecessary parts; any other file unchanged.

    Raises TooManyPartsError and AnimatedError. Other faults of a file are left to the decoder.
    """
    if file.startswith(PNG_SIGNATURE):
        return essential_png(file)
    if file.startswith(JPEG_SIGNATURE):
        return essential_jpeg(file)
    if file[:4] == b"RIFF" and file[8:12] == b"WEBP":
        return essential_webp(file)
    return file


def essential_png(file: bytes) -> bytes:
    kept, texts, has_exif = [PNG_SIGNATURE], 0, False
    for kind, start, end in chunks(file, len(PNG_SIGNATURE), "big"):
        if kind == b"acTL" and int.from_bytes(file[start + 8 : start + 12], "big") > 1:
            raise AnimatedError
        texts += kind in PNG_TEXTS
        is_exif = kind == b"eXIf" and not has_exif and end - start <= MAX_METADATA_BYTES
        if kind in PNG_PIXELS or (kind in PNG_TEXTS and texts <= MAX_TEXTS) or is_exif:
            kept.append(file[start:end])
        has_exif = has_exif or is_exif
        if kind == b"IEND":
            break
    return b"".join(kept)


def essential_webp(file: bytes) -> bytes:
    kept, frames, has_exif = [], 0, False
    for kind, start, end in chunks(file, 12, "little"):
        frames += kind == b"ANMF"
        if frames > 1:
            raise AnimatedError
        is_exif = kind == b"EXIF" and not has_exif and end - start <= MAX_METADATA_BYTES
        if kind in WEBP_PIXELS or is_exif:
            kept.append(file[start:end])
        has_exif = has_exif or is_exif
    if kept and kept[0].startswith(b"VP8X") and len(kept[0]) > 8:
        flags = kept[0][8] & ~(WEBP_ICC_AND_XMP | (0 if has_exif else WEBP_EXIF))
        kept[0] = kept[0][:8] + bytes([flags]) + kept[0][9:]
    body = b"".join(kept)
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body


def chunks(file: bytes, start: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk: of a PNG if the byte order is "big", of a WebP file if "little"."""
    count = 0
    while start + 8 <= len(file):
        count += 1
        if count > MAX_PARTS:
            raise TooManyPartsError
        if order == "big":
            size, kind = int.from_bytes(file[start : start + 4], "big"), file[start + 4 : start + 8]
            end = start + size + 12  # with its checksum
        else:
            size, kind = int.from_bytes(file[start + 4 : start + 8], "little"), file[start : start + 4]
            end = start + 8 + size + size % 2
        yield kind, start, min(end, len(file))
        start = end


def essential_jpeg(file: bytes) -> bytes:
    """Removes unnecessary segments before the first scan; everything from there on is unchanged."""
    kept, position, has_exif = [file[:2]], 2, False
    for _ in range(MAX_PARTS):
        marker = JPEG_MARKER.search(file, position)  # skips what lies between two segments, as decoders do
        if marker is None:
            return b"".join(kept)
        kind, begin = marker[1][0], marker.end() - 2
        if kind in (START_OF_SCAN, END_OF_IMAGE):
            return b"".join((*kept, file[begin:]))
        if kind in JPEG_ALONE:
            position = marker.end()
            continue
        position = marker.end() + max(2, int.from_bytes(file[marker.end() : marker.end() + 2], "big"))
        is_exif = kind == EXIF and not has_exif and file.startswith(EXIF_HEADER, marker.end() + 2)
        if kind in JPEG_PIXELS or kind in (JFIF, ADOBE) or is_exif:
            kept.append(file[begin:position])
        has_exif = has_exif or is_exif
    raise TooManyPartsError

"""Messages between the API process and the worker: lengths, a JSON header, raw bytes. No pickle."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

LENGTHS = struct.Struct(">II")  # of the header, of all blobs together


def pack(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """One message; the header learns the blobs' sizes."""
    text = json.dumps(header | {"blobs": [len(blob) for blob in blobs]}).encode()
    body = b"".join(blobs)
    return LENGTHS.pack(len(text), len(body)) + text + body


def unpack(text: bytes, body: bytes) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    """The inverse of pack(), of what follows the lengths."""
    header = json.loads(text)
    blobs, begin = [], 0
    for size in header.pop("blobs"):
        blobs.append(body[begin : begin + size])
        begin += size
    return header, tuple(blobs)


def read(stream: BinaryIO) -> tuple[dict[str, Any], tuple[bytes, ...]] | None:
    """The next message of a blocking stream; None at its end."""
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    of_text, of_body = LENGTHS.unpack(lengths)
    text, body = stream.read(of_text), stream.read(of_body)
    return unpack(text, body) if len(text) + len(body) == of_text + of_body else None

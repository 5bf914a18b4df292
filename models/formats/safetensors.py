"""Which tensors a file holds: names, types, shapes and places, without reading one.

Free of torch. Nothing here takes a file's word for anything that its size does not confirm.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from models.errors import CheckpointError

SIZES = {  # bytes of a number, by torch's names
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1,
    "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip
FLOATS = ("float64", "float32", "float16", "bfloat16")  # what weights may be
SAFETENSORS_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
HEADER_LIMIT = 2**24  # bytes; the largest models' headers are below 2**20
VALUES_LIMIT = 2**20  # bytes of a tensor whose numbers are read here
SNIFFED = 512  # bytes that tell what a file is

ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"
TEXTS = {  # how files begin that were downloaded in the place of weights
    b"version https://git-lfs": "is a Git LFS pointer: the weights themselves were not downloaded",
    b"<": "is a web page",
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    dtype: str  # torch's name
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in numbers
    start: int  # its first byte in the file
    extent: int  # bytes from the first to the last, gaps included

    @property
    def count(self) -> int:
        """Numbers."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Without gaps."""
        return self.count * SIZES[self.dtype]


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps."""
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))


@contextmanager
def opened(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file and its size. What is wrong with it (OSError, ValueError) becomes one sentence."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            state = os.fstat(stream.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise ValueError("it is no plain file")
            yield stream, state.st_size
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"{file} is corrupt or cut short: {error or 'out of memory'}") from error


def sniff(file: Path, stream: BinaryIO, size: int) -> bytes:
    """How a file begins. Raises for one that is empty, or that is no file of weights of any kind."""
    if not size:
        raise ValueError("it is empty")
    head = stream.read(SNIFFED)
    for start, what in TEXTS.items():
        if head.lstrip().startswith(start):
            raise CheckpointError(f"{file} {what}")
    return head


def safetensors_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file. Raises CheckpointError unless they fill it exactly, in any order."""
    with opened(file) as (stream, size):
        head = sniff(file, stream, size)
        # A header of 640 bytes begins like a pickle, too.
        if head.startswith((ZIP, PICKLE)) and head[8:9] != b"{":
            raise CheckpointError(f"{file} is a pickled checkpoint by its contents, whatever its name says")
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header would have {length} bytes, the file has {size}")
        if length > HEADER_LIMIT:
            raise ValueError(f"its header has {length} bytes, more than {HEADER_LIMIT}")
        stream.seek(8)
        entries = json.loads(stream.read(length), object_pairs_hook=unique)
        if not isinstance(entries, dict):
            raise ValueError("its header is no object")
        check_metadata(entries.pop("__metadata__", {}))
        stored = {name: safetensors_entry(name, entry, 8 + length) for name, entry in entries.items()}
        check_filled(stored, 8 + length, size)
        return stored


def safetensors_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself, after safetensors_header() found nothing wrong with it."""
    with opened(file) as (stream, _):
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little"))).get("__metadata__", {})


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where two values have one name."""
    if len(values := dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return values


def check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ in its header is no object of texts")


def safetensors_entry(name: str, entry: Any, data: int) -> Stored:
    """One line of a header; data: where the numbers begin."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} in its header has no dtype, shape and data_offsets")
    dtype = SAFETENSORS_TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{name!r} has the unknown type {entry['dtype']!r}")
    shape, (begin, end) = numbers(entry["shape"], name), numbers(entry["data_offsets"], name, 2)
    stored = Stored(dtype, shape, contiguous(shape), data + begin, end - begin)
    if stored.bytes != stored.extent:
        raise ValueError(f"{name!r} takes {stored.extent} bytes, its shape and type {stored.bytes}")
    return stored


def numbers(value: Any, name: str, count: int | None = None) -> tuple[int, ...]:
    """A list of whole numbers from 0."""
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{name!r} has {str(value)[:80]} where whole numbers are expected")
    if len(value) != (len(value) if count is None else count):
        raise ValueError(f"{name!r} has {len(value)} numbers where {count} are expected")
    return tuple(value)


def check_filled(stored: dict[str, Stored], begin: int, end: int) -> None:
    """Raise ValueError for gaps, overlaps, and what lies outside of the file."""
    for name, entry in sorted(stored.items(), key=lambda item: (item[1].start, item[1].extent)):
        if entry.start != begin:
            raise ValueError(f"{name!r} overlaps another tensor or leaves a gap")
        begin += entry.extent
    if begin != end:
        raise ValueError(f"its tensors end at byte {begin}, the file at {end}")


def values(file: Path, stored: Stored) -> np.ndarray:
    """The numbers of a small tensor of floats, in any shape: float64. Raises CheckpointError for others."""
    if stored.dtype not in FLOATS or stored.extent > VALUES_LIMIT:
        raise CheckpointError(f"{file}: {stored.dtype} {stored.shape} where a few floats are expected")
    with opened(file) as (stream, _):
        stream.seek(stored.start)
        data = stream.read(stored.extent)
        if stored.dtype == "bfloat16":  # the upper half of a float32
            flat = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(data, np.dtype(stored.dtype).newbyteorder("<"))
        steps = [step * flat.itemsize for step in stored.stride]
        return np.lib.stride_tricks.as_strided(flat, stored.shape, steps, writeable=False).astype(np.float64)

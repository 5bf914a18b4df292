"""Reads which tensors a safetensors file has: names, types, shapes and positions, but not their values.

Values in a header are checked against the file's size, and reading any header takes bounded time and memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from models.errors import CheckpointError
from models.formats.config_files import reason, shortened

ITEM_SIZES = {  # torch's names of types -> bytes of one number
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool"), 1),
}
FLOATS = ("float64", "float32", "float16", "bfloat16")
FLOATS_OF_8_BITS = ("float8_e4m3fn", "float8_e5m2")
WEIGHT_TYPES = (*FLOATS, *FLOATS_OF_8_BITS)  # types that weights may have
SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
MAX_HEADER_BYTES = 2**24  # metadata of LoRAs may take some megabytes
MAX_TENSORS = 2**15  # the largest models have a few thousand
MAX_DIMENSIONS = 64
MAX_VALUES_BYTES = 2**20  # of a tensor whose values are read without torch
SNIFFED_BYTES = 512  # at the beginning of a file, to recognise its format

ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"
NOT_WEIGHTS = {  # first bytes of files that are often downloaded by mistake -> what they are
    b"version https://git-lfs": "is a Git LFS pointer: the weights themselves were not downloaded",
    b"<": "is a web page",
}
# Also matches an unterminated string: a search that fails at every quote would take quadratic time.
JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    dtype: str  # torch's name
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in numbers
    start: int  # position of its first byte in the file
    extent: int  # bytes from the first to the last, gaps included

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size without gaps."""
        return self.count * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Header:
    """The tensors of a file, and its metadata."""

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors file

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: stored.shape for key, stored in self.tensors.items()}


def is_safetensors(file: Path) -> bool:
    """Whether a file's name ends in .safetensors, in any case."""
    return file.suffix.lower() == ".safetensors"


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps."""
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))


@contextmanager
def opened(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A context with a file and its size; errors of reading and parsing in it become a CheckpointError."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            state = os.fstat(stream.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise ValueError("it is not a regular file")
            yield stream, state.st_size
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is corrupt or truncated: {reason(error) or 'out of memory'}"
        ) from error


def sniff(file: Path, stream: BinaryIO, size: int) -> bytes:
    """The first bytes of a file. Raises ValueError or CheckpointError if it cannot be a file of weights."""
    if not size:
        raise ValueError("it is empty")
    head = stream.read(SNIFFED_BYTES)
    for start, description in NOT_WEIGHTS.items():
        if head.lstrip().startswith(start):
            raise CheckpointError(f"{file} {description}")
    return head


def read_safetensors(file: Path) -> Header:
    """The header of a safetensors file.

    Raises CheckpointError unless its tensors, in any order, fill the file exactly.
    """
    with opened(file) as (stream, size):
        head = sniff(file, stream, size)
        # A safetensors file with a header of 640 bytes begins like a pickle, too.
        if head.startswith((ZIP, PICKLE)) and head[8:9] != b"{":
            raise CheckpointError(f"{file} is a pickled checkpoint, although its name ends in .safetensors")
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"its header would have {length} bytes, the file has {size}")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
        stream.seek(8)
        text = stream.read(length)
        check_structure(text)
        entries = json.loads(text, object_pairs_hook=unique)
        if not isinstance(entries, dict):
            raise ValueError("its header is not an object")
        metadata = entries.pop("__metadata__", {})
        check_metadata(metadata)
        tensors = {name: stored_tensor(name, entry, 8 + length) for name, entry in entries.items()}
        check_filled(tensors, 8 + length, size)
        return Header(tensors, metadata)


def check_structure(text: bytes) -> None:
    """Raise ValueError for a header with very many values, before it is parsed."""
    if text.count(b'"') - text.count(b'\\"') > 32 * MAX_TENSORS:
        raise ValueError(f"its header has more than {MAX_TENSORS} tensors")
    outside = JSON_STRING.sub(b"", text)  # the text outside strings
    if outside.count(b"{") > MAX_TENSORS + 2 or outside.count(b"[") > 2 * MAX_TENSORS:
        raise ValueError(f"its header has more than {MAX_TENSORS} tensors")
    if outside.count(b",") > 16 * MAX_TENSORS:
        raise ValueError("its header has too many values")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if a name occurs twice."""
    if len(values := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return values


def check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ in its header is not an object of strings")


def stored_tensor(name: str, entry: Any, data: int) -> Stored:
    """An entry of a header. data: position in the file where tensors begin."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shortened(name)} in its header has no dtype, shape and data_offsets")
    dtype = SAFETENSORS_TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{shortened(name)} has the unknown type {shortened(entry['dtype'])}")
    shape, offsets = whole_numbers(entry["shape"], name), whole_numbers(entry["data_offsets"], name)
    if len(offsets) != 2:
        raise ValueError(f"{shortened(name)} has {len(offsets)} data_offsets, expected 2")
    stored = Stored(dtype, shape, contiguous(shape), data + offsets[0], offsets[1] - offsets[0])
    if stored.bytes != stored.extent:
        raise ValueError(f"{shortened(name)} takes {stored.extent} bytes, its shape and type {stored.bytes}")
    return stored


def whole_numbers(value: Any, name: str) -> tuple[int, ...]:
    """A list of few whole numbers, none negative. Raises ValueError for other values."""
    valid = isinstance(value, list) and len(value) <= MAX_DIMENSIONS
    if not valid or not all(type(number) is int and 0 <= number < 2**63 for number in value):
        raise ValueError(f"{shortened(name)} has {shortened(value)}, expected a list of whole numbers")
    return tuple(value)


def check_filled(tensors: Mapping[str, Stored], begin: int, end: int) -> None:
    """Raise ValueError unless the tensors fill a file from `begin` to `end`, without gaps and overlaps."""
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].extent)):
        if entry.start != begin:
            raise ValueError(f"{shortened(name)} overlaps another tensor or leaves a gap")
        begin += entry.extent
    if begin != end:
        raise ValueError(f"its tensors end at byte {begin}, the file at {end}")


def read_values(file: Path, stored: Stored) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The numbers of a small tensor of floats, of any shape. Raises CheckpointError for other tensors."""
    if stored.dtype not in FLOATS or stored.extent > MAX_VALUES_BYTES:
        raise CheckpointError(f"{file}: expected a few floats, found {stored.dtype} {stored.shape}")
    with opened(file) as (stream, _):
        stream.seek(stored.start)
        data = stream.read(stored.extent)
        if stored.dtype == "bfloat16":  # the upper half of a float32
            flat: np.ndarray[Any, Any] = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(data, np.dtype(stored.dtype).newbyteorder("<"))
        steps = [step * flat.itemsize for step in stored.stride]
        return np.lib.stride_tricks.as_strided(flat, stored.shape, steps, writeable=False).astype(np.float64)

"""Reads small configuration files, JSON and YAML, as plain containers, in bounded time and memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from models.errors import CheckpointError

Config = dict[str, Any]

MAX_JSON_BYTES = 2**20
MAX_YAML_BYTES = 2**18  # published configurations have a few kilobytes
MAX_YAML_EVENTS = 10_000  # values, and beginnings and ends of containers
MAX_YAML_DEPTH = 64
MAX_YAML_SCALAR = 2**12  # characters of a value that may be a number: YAML's base 60 takes quadratic time
MAX_ERROR_CHARS = 80  # of a value that an error repeats
MAX_REASON_CHARS = 300  # of a library's error

# The parser in C, if PyYAML was built with it: the one in Python takes 50 times as long.
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_json(path: Path) -> Config:
    """The JSON object in a file. Raises CheckpointError if there is none."""
    return read_object(path, "JSON", parse_json, MAX_JSON_BYTES)


def read_yaml(path: Path) -> Config:
    """The YAML mapping in a file, of plain values only. Raises CheckpointError if there is none."""
    return read_object(path, "YAML", parse_yaml, MAX_YAML_BYTES)


def read_object(path: Path, form: str, parse: Callable[[str], Any], max_bytes: int) -> Config:
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path} is larger than {max_bytes} bytes")
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read as {form}: {reason(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must contain a {form} object")
    return value


def reason(error: BaseException) -> str:
    """A library's error message in one line, cut to MAX_REASON_CHARS; it may quote the file."""
    text = " ".join(str(error).split())  # YAML's messages have several lines
    return text if len(text) <= MAX_REASON_CHARS else text[:MAX_REASON_CHARS] + "..."


def parse_json(text: str) -> Any:
    """Raises ValueError also for NaN, infinite and overflowing numbers, RecursionError for deep nesting."""
    return json.loads(text, parse_constant=refuse_constant, parse_float=finite_float)


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:MAX_ERROR_CHARS]} is too large a number")
    return value


def parse_yaml(text: str) -> Any:
    """Parse a YAML document in time and memory that are bounded by its length.

    Raises ValueError for references to other parts, deep nesting, very many values and very long numbers.
    """
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=YAML_LOADER)):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it refers to other parts of itself (*name)")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and may_be_number(event):
            raise ValueError(f"it has a value of more than {MAX_YAML_SCALAR} characters without quotes")
        if depth > MAX_YAML_DEPTH or count > MAX_YAML_EVENTS:
            limits = f"{MAX_YAML_DEPTH} levels or {MAX_YAML_EVENTS} values"
            raise ValueError(f"it has more than {limits}")
    return yaml.load(text, Loader=YAML_LOADER)


def may_be_number(event: yaml.ScalarEvent) -> bool:
    """Whether a value is very long and YAML would try to read it as a number."""
    return len(event.value) > MAX_YAML_SCALAR and bool(event.tag or event.implicit[0])


def shortened(value: Any) -> str:
    """A value for an error message, cut to MAX_ERROR_CHARS."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deeply nested list
        return f"a very large {type(value).__name__}"
    return text if len(text) <= MAX_ERROR_CHARS else text[:MAX_ERROR_CHARS] + "..."

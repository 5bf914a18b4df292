"""Small files of settings: JSON and YAML, as plain containers. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from models.errors import CheckpointError

Config = dict[str, Any]

OWN_FILE = "ldm.json"  # what a published layout has no place for
LIMIT = 2**20  # bytes


def read_json(path: Path) -> Config:
    """A JSON object from a file. Raises CheckpointError where there is none."""
    return read_object(path, "JSON", json.loads)


def read_yaml(path: Path) -> Config:
    """A YAML mapping from a file, of plain values only. Raises CheckpointError where there is none."""
    return read_object(path, "YAML", unshared_yaml)


def unshared_yaml(text: str) -> Any:
    """Raises ValueError for references to other parts: a few of them can stand for more than memory holds."""
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("it refers to parts of itself (*name)")
    return yaml.safe_load(text)


def read_object(path: Path, form: str, parse: Callable[[str], Any]) -> Config:
    try:
        if path.stat().st_size > LIMIT:
            raise CheckpointError(f"{path} is larger than {LIMIT} bytes")
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # YAML's take several lines
        raise CheckpointError(f"{path} cannot be read as {form}: {reason}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a {form} object")
    return value

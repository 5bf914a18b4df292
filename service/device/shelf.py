"""What is known about the files of a catalogue, so that each is read once until it changes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from models.errors import CheckpointError
from service.catalogue import Entry, Ignored, Kind, ignored, version_of

log = logging.getLogger(__name__)

Value = TypeVar("Value")


class Shelf:
    """What is known about files, and the files that are ignored, while a catalogue is read."""

    def __init__(self, known: Mapping[Hashable, Any], ignored: list[Ignored]) -> None:
        self.known, self.ignored = known, ignored
        self.used: dict[Hashable, Any] = {}

    def read(self, entry: Entry, read: Callable[[], Value], *more: Hashable) -> Value | None:
        """read() of a file, once until the file or `more` changes; None if the file is ignored."""
        key = (*entry, *more)
        if key in self.known:
            self.used[key] = self.known[key]
        else:
            self.used[key] = attempt(read)
        value: Value | Exception = self.used[key]
        if isinstance(value, Exception):
            self.ignore(entry, str(value))
            return None
        return value

    def ignore(self, entry: Entry, reason: str) -> None:
        self.ignored.append(ignored(entry, reason))


def attempt(read: Callable[[], Value]) -> Value | Exception:
    """The value, or the error: no file of a folder may stop the worker."""
    try:
        return read()
    except (CheckpointError, OSError) as error:
        return error
    except Exception as error:
        log.warning("a file could not be read", exc_info=True)
        return CheckpointError(f"it cannot be read: {type(error).__name__}")


def given(kind: Kind, files: Mapping[str, Path]) -> list[Entry]:
    """Files given at start-up, as entries."""
    return [Entry(kind, name, str(file), name, version_of(file)) for name, file in files.items()]

"""Measures how the time of loading a model is spent."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stopwatch:
    """Seconds per named part of a sequence of work; parts of the same name add up."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.parts: dict[str, float] = {}
        self._clock = clock
        self._last = clock()

    def lap(self, name: str) -> None:
        """Attribute the time since the previous lap to `name`."""
        now = self._clock()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now

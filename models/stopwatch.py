"""Where the time of a start goes."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stopwatch:
    """Seconds of parts that follow each other; parts of one name add up."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.parts: dict[str, float] = {}
        self._clock = clock
        self._last = clock()

    def lap(self, name: str) -> None:
        """What was done since the last lap was this."""
        now = self._clock()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now

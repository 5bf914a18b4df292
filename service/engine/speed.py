"""How long UNet calls take: running averages."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from cachetools import LRUCache

from service.engine.job import Segment
from service.engine.row_limits import MAX_GROUPS
from service.engine.runner import Call

EMA_ALPHA = 0.2  # weight of the newest call in the averages


class CallSize(NamedTuple):
    """The size of a UNet call. segment: of an image; rows: without padding rows; padded_rows: with them."""

    segment: Segment
    rows: int
    padded_rows: int


class Speed:
    """Seconds per unit of work over all calls, and per row of each group."""

    def __init__(self) -> None:
        self.seconds_per_work: float | None = None
        self._row_seconds: LRUCache[Hashable, float] = LRUCache(MAX_GROUPS)
        self._last: CallSize | None = None

    def row_seconds(self, group: Hashable) -> float:
        """Seconds that a row of the group takes; 0 if unknown."""
        return self._row_seconds.get(group, 0.0)

    def seconds(self, work: float) -> float | None:
        """Seconds that an amount of work takes, if known."""
        return None if self.seconds_per_work is None else work * self.seconds_per_work

    def record(self, size: CallSize, call: Call, seconds: float) -> None:
        """Add a call to the averages; an unfinished one is added when the next call is recorded."""
        previous, self._last = self._last, size
        if not call.unfinished:
            self._average(size, seconds)
        elif previous and call.seconds is not None:
            self._average(previous, call.seconds)

    def _average(self, size: CallSize, seconds: float) -> None:
        pace = seconds / (size.rows * size.segment.row_cost)
        before = self.seconds_per_work
        self.seconds_per_work = pace if before is None else before + EMA_ALPHA * (pace - before)
        self._average_row(size.segment.group, seconds / size.padded_rows)

    def _average_row(self, group: Hashable, seconds: float) -> None:
        """Average the seconds per row; a group's first call is left out, since it may compile kernels."""
        before = self._row_seconds.get(group)
        if before:
            seconds = before + EMA_ALPHA * (seconds - before)
        self._row_seconds[group] = 0.0 if before is None else seconds

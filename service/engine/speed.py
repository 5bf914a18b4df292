"""How long UNet calls take: running averages."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from cachetools import LRUCache

from service.engine.row_limits import MAX_GROUPS
from service.engine.runner import Call

EMA_ALPHA = 0.2  # weight of the newest call in the averages


class CallSize(NamedTuple):
    """The size of a UNet call. rows: without padding rows; padded_rows: with them; work: as in Segment."""

    group: Hashable
    rows: int
    padded_rows: int
    work: float


class Speed:
    """Seconds per unit of work over all calls, and of the calls of each group by their number of rows.

    Slow calls, which compile or record, are left out; so is a group's first call, which may compile kernels.
    """

    def __init__(self) -> None:
        self.seconds_per_work: float | None = None
        self._calls: LRUCache[Hashable, dict[int, float]] = LRUCache(MAX_GROUPS)
        self._last: tuple[CallSize, Call] | None = None

    def call_seconds(self, group: Hashable, rows: int) -> float:
        """Seconds of a call of so many rows, padding included; 0 if unknown.

        Of sizes that were not measured, in proportion to the nearest smaller one, or else the smallest.
        """
        measured = self._calls.get(group)
        if not measured:
            return 0.0
        nearest = max((size for size in measured if size <= rows), default=min(measured))
        return measured[nearest] * rows / nearest

    def seconds(self, work: float) -> float | None:
        """Seconds that an amount of work takes, if known."""
        return None if self.seconds_per_work is None else work * self.seconds_per_work

    def record(self, size: CallSize, call: Call, seconds: float) -> None:
        """Add a call to the averages; an unfinished one is added when the next call is recorded."""
        previous, self._last = self._last, (size, call)
        if not call.unfinished:
            self._average(size, call, seconds)
        elif previous and call.seconds is not None:
            self._average(*previous, call.seconds)

    def _average(self, size: CallSize, call: Call, seconds: float) -> None:
        if call.slow:
            return
        self.seconds_per_work = averaged(self.seconds_per_work, seconds / size.work)
        measured = self._calls.get(size.group)
        if measured is None:  # the group's first call
            self._calls[size.group] = {}
        else:
            measured[size.padded_rows] = averaged(measured.get(size.padded_rows), seconds)


def averaged(before: float | None, value: float) -> float:
    """The running average with a new value; `before`: None without a value so far."""
    return value if before is None else before + EMA_ALPHA * (value - before)

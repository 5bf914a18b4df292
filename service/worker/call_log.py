"""The most recent UNet calls, which GET /activity returns."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from service.engine.events import Stepped

MAX_CALLS = 256


class RecordedCall(NamedTuple):
    """A UNet call, and the number of the replica that made it."""

    replica: int
    call: Stepped


class CallLog:
    """Keeps the last MAX_CALLS calls of all replicas; `count` numbers them from 1."""

    def __init__(self) -> None:
        self.count = 0
        self._calls: deque[RecordedCall] = deque(maxlen=MAX_CALLS)

    def record(self, replica: int, call: Stepped) -> None:
        self.count += 1
        self._calls.append(RecordedCall(replica, call))

    def after(self, number: int) -> list[RecordedCall]:
        """The kept calls with numbers above `number`, the oldest first."""
        new = self.count - number
        return list(self._calls)[-new:] if new > 0 else []

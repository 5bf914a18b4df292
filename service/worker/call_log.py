"""The most recent UNet calls, which GET /activity returns."""

from __future__ import annotations

from collections import deque

from service.engine.events import Stepped

MAX_CALLS = 256


class CallLog:
    """Keeps the last MAX_CALLS calls; `count` numbers them from 1."""

    def __init__(self) -> None:
        self.count = 0
        self._calls: deque[Stepped] = deque(maxlen=MAX_CALLS)

    def record(self, call: Stepped) -> None:
        self.count += 1
        self._calls.append(call)

    def after(self, number: int) -> list[Stepped]:
        """The kept calls with numbers above `number`, the oldest first."""
        new = self.count - number
        return list(self._calls)[-new:] if new > 0 else []

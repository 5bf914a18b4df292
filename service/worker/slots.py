"""The slots of the queue: how many requests are open, and which error refuses another one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from service.errors import Draining, Loading, QueueFull, ServiceError, Unavailable

RETRY_AFTER = {QueueFull: 5, Loading: 5, Draining: 30, Unavailable: 30}  # seconds


class Slots:
    """A limited number of slots, each held by one open request."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        self._none_in_use = asyncio.Event()
        self._none_in_use.set()

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """Hold a slot until the context ends. Raises QueueFull."""
        if self.in_use >= self.limit:
            raise refusal(QueueFull)
        self.in_use += 1
        self._none_in_use.clear()
        try:
            yield
        finally:
            self.in_use -= 1
            if not self.in_use:
                self._none_in_use.set()

    async def wait_until_free(self, seconds: float) -> None:
        """Wait until no slot is in use, at most so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._none_in_use.wait(), seconds)


def refusal(kind: type[ServiceError]) -> ServiceError:
    """An error of this kind, with its Retry-After seconds."""
    return kind(retry_after=RETRY_AFTER[kind])

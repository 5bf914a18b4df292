"""The slots of the queue: how many requests are open, and which error refuses another one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from service.errors import Draining, Loading, QueueFull, ServiceError, Unavailable
from service.keys.client import ANYBODY, Client

RETRY_AFTER = {QueueFull: 5, Loading: 5, Draining: 30, Unavailable: 30}  # seconds


class Slots:
    """A limited number of slots, each held by one open request.

    While there are several clients, one gets another slot only if it holds fewer than are free. So one that
    takes all it gets leaves half of them to others, two leave a third, and there is always a place for a
    client that comes (the dynamic thresholds of Choudhury and Hahne 1998).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        self._held: Counter[str] = Counter()  # by the client's id
        self._none_in_use = asyncio.Event()
        self._none_in_use.set()

    @contextmanager
    def reserve(self, client: Client = ANYBODY) -> Iterator[None]:
        """Hold a slot until the context ends. Raises QueueFull."""
        free = self.limit - self.in_use
        if not free:
            raise refusal(QueueFull)
        if not client.alone and self._held[client.id] >= free:
            raise QueueFull("this key's part of the queue is full", retry_after=RETRY_AFTER[QueueFull])
        self.in_use += 1
        self._held[client.id] += 1
        self._none_in_use.clear()
        try:
            yield
        finally:
            self.in_use -= 1
            self._held[client.id] -= 1
            if not self._held[client.id]:
                del self._held[client.id]
            if not self.in_use:
                self._none_in_use.set()

    async def wait_until_free(self, seconds: float) -> None:
        """Wait until no slot is in use, at most so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._none_in_use.wait(), seconds)


def refusal(kind: type[ServiceError]) -> ServiceError:
    """An error of this kind, with its Retry-After seconds."""
    return kind(retry_after=RETRY_AFTER[kind])

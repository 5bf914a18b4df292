"""UNet calls as they happen, for those who watch the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from service.engine.events import Stepped

MAX_PENDING = 256  # calls kept for a slow watcher; the oldest are dropped beyond it


class CallFeed:
    """Hands every UNet call to all who watch. A slow watcher misses calls and never delays anyone."""

    def __init__(self) -> None:
        self._watchers: set[asyncio.Queue[Stepped]] = set()

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def publish(self, call: Stepped) -> None:
        for pending in self._watchers:
            if pending.full():
                pending.get_nowait()
            pending.put_nowait(call)

    async def watch(self, silence: float) -> AsyncIterator[Stepped | None]:
        """Calls from now on; None after each `silence` seconds without one."""
        pending: asyncio.Queue[Stepped] = asyncio.Queue(MAX_PENDING)
        self._watchers.add(pending)
        try:
            while True:
                try:
                    yield await asyncio.wait_for(pending.get(), silence)
                except TimeoutError:
                    yield None
        finally:
            self._watchers.discard(pending)

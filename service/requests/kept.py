"""How long something stays in memory for clients that fetch it later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.settings import Settings


class Kept:
    """Names of what is kept: the newest, within the limits jobs_kept, jobs_bytes and jobs_seconds.

    The newest stays, however large it is. drop: called with the name of what is kept no longer. One timer
    serves all names: a timer for each would outlive the names that make room for others.
    """

    def __init__(self, settings: Settings, drop: Callable[[str], None]) -> None:
        self._settings = settings
        self._drop = drop
        self._entries: dict[str, tuple[int, float]] = {}  # name -> (bytes, when it expires); oldest first
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None  # set while there are entries

    def add(self, name: str, size: int) -> None:
        """Keep something of `size` bytes from now on."""
        settings = self._settings
        self._entries[name] = size, asyncio.get_running_loop().time() + settings.jobs_seconds
        self._bytes += size
        while len(self._entries) > settings.jobs_kept or (
            self._bytes > settings.jobs_bytes and len(self._entries) > 1
        ):
            self.remove(next(iter(self._entries)))
        if self._timer is None:
            self._expire()

    def remove(self, name: str) -> None:
        """Keep something no longer; an unknown name is left alone."""
        if name in self._entries:
            self._bytes -= self._entries.pop(name)[0]
            self._drop(name)

    def _expire(self) -> None:
        """Remove what has expired, and do so again when the next entry expires."""
        loop, self._timer = asyncio.get_running_loop(), None
        for name, (_, end) in list(self._entries.items()):
            if end > loop.time():
                self._timer = loop.call_at(end, self._expire)
                return
            self.remove(name)

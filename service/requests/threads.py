"""Threads in which requests are read and image files written, outside the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

from service.keys.client import Client

Result = TypeVar("Result")

COUNT = min(32, (os.cpu_count() or 1) + 4)  # as many as asyncio.to_thread() has


class Threads:
    """A pool of threads. While there are several clients, one has at most half of the threads.

    So a client whose images take long to read does not hold up the requests of others. A function runs to its
    end, and occupies its thread, although its caller may have left.
    """

    def __init__(self, count: int = COUNT) -> None:
        self._pool = ThreadPoolExecutor(count, "request")
        self._half = max(1, count // 2)
        self._places: dict[str, asyncio.Semaphore] = {}  # by client: one for each key

    async def run(self, client: Client, function: Callable[..., Result], *args: object) -> Result:
        """Call a function in a thread, with the context variables of the caller."""
        loop, places = asyncio.get_running_loop(), None
        if not client.alone:
            places = self._places.setdefault(client.id, asyncio.Semaphore(self._half))
            await places.acquire()
        future = self._pool.submit(copy_context().run, function, *args)
        if places:
            release = places.release

            def ended(_: object) -> None:
                with suppress(RuntimeError):  # the loop is closed at shutdown
                    loop.call_soon_threadsafe(release)

            future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

"""What is kept for clients that fetch it later; the limits are tested where it is used."""

from __future__ import annotations

import asyncio

from service.requests.kept import Kept
from service.settings import Settings


def test_each_name_expires_at_its_time():
    async def scenario() -> None:
        dropped: list[str] = []
        kept = Kept(Settings(jobs_seconds=0.2), dropped.append)
        kept.add("first", 1)
        await asyncio.sleep(0.1)
        kept.add("second", 1)
        await asyncio.sleep(0.15)
        assert dropped == ["first"]
        await asyncio.sleep(0.1)
        assert dropped == ["first", "second"]

    asyncio.run(scenario())


def test_names_that_made_room_leave_nothing_behind():
    async def scenario() -> None:
        kept = Kept(Settings(jobs_kept=2, jobs_seconds=900.0), lambda _: None)
        for number in range(100):
            kept.add(str(number), 1)
        timers = asyncio.get_running_loop()._scheduled
        assert len(timers) == 1, "one timer for all names"

    asyncio.run(scenario())

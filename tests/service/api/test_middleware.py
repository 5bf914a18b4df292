"""Limits on request bodies: the size of one, and of all together."""

from __future__ import annotations

import asyncio

from service.api import middleware
from service.api.middleware import SMALL_BODY_BYTES, BodyLimit
from service.metrics import Metrics

LARGE = SMALL_BODY_BYTES + 1


class Client:
    """Sends a body in parts, and records the status of the response."""

    def __init__(self, app: BodyLimit) -> None:
        self.messages: asyncio.Queue = asyncio.Queue()
        self.status = 0
        scope = {"type": "http", "headers": [], "state": {"request_id": "r"}}
        self.call = asyncio.create_task(app(scope, self.messages.get, self.note))

    async def note(self, message: dict) -> None:
        self.status = message.get("status", self.status)

    async def send(self, size: int, more: bool = True) -> None:
        self.messages.put_nowait({"type": "http.request", "body": bytes(size), "more_body": more})
        for _ in range(3):
            await asyncio.sleep(0)


async def accept(scope, receive, send) -> None:
    """An app that answers, then waits until its client leaves."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await receive()


def test_large_bodies_share_a_limit_and_small_bodies_always_fit():
    async def scenario():
        app = BodyLimit(
            accept, limit=2 * LARGE, total_limit=3 * LARGE, metrics=Metrics(), admits=lambda scope: True
        )
        first, second, third, small, too_large = (Client(app) for _ in range(5))
        await first.send(LARGE, more=False)
        await second.send(2 * LARGE)
        assert (first.status, second.status, app.held) == (200, 0, 3 * LARGE)
        await third.send(LARGE)
        await small.send(10, more=False)
        await too_large.send(2 * LARGE + 1)
        assert (third.status, small.status, too_large.status) == (429, 200, 413)
        for client in (first, second, small):
            client.messages.put_nowait({"type": "http.disconnect"})
            await client.call
        assert app.held == 0

    asyncio.run(scenario())


def test_a_body_that_stops_halfway_is_dropped(monkeypatch):
    monkeypatch.setattr(middleware, "BODY_STALL_SECONDS", 0.2)

    async def scenario():
        app = BodyLimit(
            accept, limit=2 * LARGE, total_limit=3 * LARGE, metrics=Metrics(), admits=lambda scope: True
        )
        client = Client(app)
        await client.send(LARGE)
        assert app.held == LARGE
        await client.call
        assert (client.status, app.held) == (408, 0)

    asyncio.run(scenario())

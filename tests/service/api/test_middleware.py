"""Limits on request bodies: the size of one, and of all together."""

from __future__ import annotations

import asyncio

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


def limited(app, seconds: float = 30.0, rate: float = 2**20) -> BodyLimit:
    sizes = {"limit": 2 * LARGE, "total_limit": 3 * LARGE}
    return BodyLimit(app, **sizes, seconds=seconds, rate=rate, metrics=Metrics(), admits=lambda scope: True)


def test_large_bodies_share_a_limit_and_small_bodies_always_fit():
    async def scenario():
        app = limited(accept)
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


def test_a_body_that_stops_halfway_is_dropped():
    async def scenario():
        app = limited(accept, seconds=0.2)
        client = Client(app)
        await client.send(LARGE)
        assert app.held == LARGE
        await client.call
        assert (client.status, app.held) == (408, 0)

    asyncio.run(scenario())


def test_a_body_that_trickles_in_is_dropped_although_its_sender_never_stops():
    async def scenario():
        client = Client(limited(accept, seconds=0.2, rate=1000))
        sent = 0
        while not client.call.done():
            await client.send(1)  # allows only 1 ms more
            await asyncio.sleep(0.01)
            sent += 1
        assert client.status == 408
        assert sent < LARGE

    asyncio.run(scenario())


def test_a_body_that_comes_at_the_least_rate_is_read_however_long_it_takes():
    async def scenario():
        client = Client(limited(accept, seconds=1.0, rate=100))
        for _ in range(10):  # for more than `seconds`, but each part allows a second more
            await client.send(100)
            await asyncio.sleep(0.12)
        await client.send(1, more=False)
        assert client.status == 200
        client.messages.put_nowait({"type": "http.disconnect"})
        await client.call

    asyncio.run(scenario())

"""Slow senders, slow readers and idle connections, over sockets to a web server."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest
import uvicorn

from service.api.connections import (
    MAX_HEADER_BYTES,
    PROBES,
    ConnectionLimits,
    Connections,
    limits_of,
    protocol_of,
)
from service.settings import Settings

LIMITS = ConnectionLimits(count=4, header=60.0, idle=60.0, body=60.0, rate=1e6)
SOON = 0.4  # a time limit that a test waits for
REQUEST = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
LARGE = 2**23  # bytes; more than the sockets' buffers take


class App:
    """Answers at once; below /wait when `release` is set; below /large with LARGE bytes."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:
        if scope["path"] == "/wait":
            await self.release.wait()
        body = bytes(LARGE) if scope["path"] == "/large" else b"ok"
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Scenario = Callable[[Connections, Callable[[], Awaitable[Peer]], App], Awaitable[None]]


def run(scenario: Scenario, **limits: float) -> None:
    """Run a scenario with the connections of a server, a function that connects to it, and its app."""

    async def serve() -> None:
        app, connections = App(), Connections(replace(LIMITS, **limits))
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app,
            http=protocol_of(connections),
            lifespan="off",
            log_config=None,
            h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
        )
        server = uvicorn.Server(config)
        tasks = [
            asyncio.create_task(server.serve([listener])),
            asyncio.create_task(connections.watch()),
        ]
        while not server.started:
            await asyncio.sleep(0.01)

        async def connect() -> Peer:
            reader, writer = await asyncio.open_connection(*listener.getsockname(), limit=2**16)
            await asyncio.sleep(0.01)  # so that connections are opened in the order of these calls
            writers.append(writer)
            return reader, writer

        writers: list[asyncio.StreamWriter] = []
        await scenario(connections, connect, app)
        app.release.set()
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        server.force_exit = server.should_exit = True
        await tasks[0]
        tasks[1].cancel()

    asyncio.run(asyncio.wait_for(serve(), 60))


async def request(peer: Peer, path: str = "/") -> bytes:
    """Send a request and return the first line of the response."""
    peer[1].write(REQUEST.replace(b"GET /", b"GET " + path.encode()))
    return await peer[0].readline()


async def is_closed(peer: Peer) -> None:
    """Return when the server has closed a connection."""
    with suppress(ConnectionError):
        while await peer[0].read(2**16):
            pass


def test_a_connection_that_sends_nothing_is_closed():
    async def scenario(connections, connect, app):
        await is_closed(await connect())
        assert len(connections) == 0

    run(scenario, header=SOON)


def test_headers_that_trickle_in_are_given_up():
    async def scenario(connections, connect, app):
        peer = await connect()
        closed = asyncio.create_task(is_closed(peer))
        for byte in REQUEST * 100:
            peer[1].write(bytes([byte])) if byte not in b"\r\n" else None
            await asyncio.sleep(0.02)
            if closed.done():
                break
        assert closed.done()

    run(scenario, header=SOON)


def test_a_connection_is_closed_some_time_after_its_last_response():
    async def scenario(connections, connect, app):
        peer = await connect()
        assert await request(peer) == b"HTTP/1.1 200 OK\r\n"
        await is_closed(peer)

    run(scenario, idle=SOON)


def test_the_headers_of_a_later_request_may_not_trickle_in_either():
    async def scenario(connections, connect, app):
        peer = await connect()
        await request(peer)
        peer[1].write(b"GET /")
        await is_closed(peer)

    run(scenario, idle=SOON, header=SOON)


@pytest.fixture(params=["httptools_impl.HttpToolsProtocol", "h11_impl.H11Protocol"])
def parser(request, monkeypatch):
    """Each of uvicorn's HTTP parsers."""
    module, name = request.param.split(".")
    parsers = pytest.importorskip(f"uvicorn.protocols.http.{module}")
    monkeypatch.setattr("service.api.connections.AutoHTTPProtocol", getattr(parsers, name))


@pytest.mark.parametrize("end", [b"", b"\r\n"], ids=["without an end", "in one piece"])
def test_too_large_headers_get_a_431_and_end_the_connection(parser, end):
    async def scenario(connections, connect, app):
        reader, writer = await connect()
        writer.write(REQUEST[:-2] + b"X: " + b"x" * MAX_HEADER_BYTES + b"\r\n" + end)
        answer = (await reader.read()).decode()  # until the server ends its side of the connection
        assert answer.startswith("HTTP/1.1 431 Request Header Fields Too Large\r\n")
        assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "headers_too_large"
        writer.write(REQUEST)  # is not answered
        while connections:
            await asyncio.sleep(0.05)

    run(scenario, header=SOON)


def test_headers_up_to_the_limit_are_read(parser):
    async def scenario(connections, connect, app):
        peer = await connect()
        headers = b"Content-Length: 99999\r\nX: " + b"x" * (MAX_HEADER_BYTES - 100)
        peer[1].write(REQUEST[:-2] + headers + b"\r\n\r\n" + bytes(99_999))
        assert await peer[0].readline() == b"HTTP/1.1 200 OK\r\n"

    run(scenario)


def test_a_client_that_does_not_take_its_response_loses_its_connection():
    async def scenario(connections, connect, app):
        peer = await connect()
        peer[1].write(REQUEST.replace(b"/ ", b"/large "))
        while connections:
            await asyncio.sleep(0.05)

    run(scenario, body=SOON)


def test_a_client_that_takes_its_response_at_the_least_rate_gets_all_of_it():
    async def scenario(connections, connect, app):
        peer = await connect()
        await request(peer, "/large")
        received = 0
        while received < LARGE:  # for longer than `body`
            received += len(await peer[0].read(2**16))
            await asyncio.sleep(0.01)
        assert len(connections) == 1

    run(scenario, body=0.5, rate=1e4)


def test_beyond_the_limit_the_connection_that_was_idle_longest_is_closed():
    async def scenario(connections, connect, app):
        peers = [await connect() for _ in range(4)]
        for peer in (peers[1], peers[2], peers[3], peers[0]):
            await request(peer)
            await peer[0].readuntil(b"ok")
        await connect()
        await is_closed(peers[1])
        assert len(connections) == 4
        for peer in (peers[0], peers[2], peers[3]):
            assert await request(peer) == b"HTTP/1.1 200 OK\r\n"

    run(scenario)


def test_a_client_that_had_a_response_keeps_its_connection_however_many_others_are_opened():
    async def scenario(connections, connect, app):
        peer = await connect()
        await request(peer)
        await peer[0].readuntil(b"ok")
        for _ in range(20):
            await connect()
        assert len(connections) == 4
        assert await request(peer) == b"HTTP/1.1 200 OK\r\n"

    run(scenario)


def test_connections_that_wait_for_a_response_are_never_closed_for_others():
    async def scenario(connections, connect, app):
        waiting = [await connect() for _ in range(4)]
        answers = [asyncio.create_task(request(peer, "/wait")) for peer in waiting]
        await asyncio.sleep(0.1)
        peer = await connect()
        assert await peer[0].readline() == b"HTTP/1.1 503 Service Unavailable\r\n"
        head, _, body = (await peer[0].read()).partition(b"\r\n\r\n")
        assert b"retry-after: 5" in head
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        app.release.set()
        assert await asyncio.gather(*answers) == [b"HTTP/1.1 200 OK\r\n"] * 4

    run(scenario)


def test_the_kernel_checks_whether_a_silent_peer_still_exists():
    async def scenario(connections, connect, app):
        await connect()
        (connection,) = connections._unanswered.values()
        opened = connection.transport.get_extra_info("socket")
        assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for name, value in PROBES.items():
            assert opened.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value

    run(scenario)


@pytest.mark.parametrize(
    ("soft", "hard", "count", "raised"),
    [(1024, 20_000, 2048, 2560), (1024, 1024, 512, None), (300, 300, 150, None), (9000, 9000, 2048, None)],
)
def test_the_limit_of_open_files_is_raised_or_fewer_connections_are_allowed(
    monkeypatch, soft, hard, count, raised
):
    calls = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: calls.append(limits))
    assert limits_of(Settings()).count == count
    assert calls == ([(raised, hard)] if raised else [])


@pytest.mark.slow
def test_the_server_closes_slow_connections_and_serves_others(start_server):
    settings = {"header": "0.5", "body": "0.5", "idle": "0.5"}
    limits = {f"LDM_{name.upper()}_SECONDS": value for name, value in settings.items()}
    with start_server(LDM_MAX_CONNECTIONS="20", **limits) as server, ExitStack() as stack:
        url = server.client.base_url
        starts = (
            b"",
            b"GET / HTTP/1.1\r\nHost: ",
            b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{",
        )
        peers = [stack.enter_context(socket.create_connection((url.host, url.port))) for _ in range(60)]
        for number, peer in enumerate(peers):
            with suppress(ConnectionError):
                peer.sendall(starts[number % 3])
        assert server.client.post("/generate", json={"prompt": "p", "steps": 1}).status_code == 200
        ends = []
        for peer in peers[-18:]:  # those that no other connection replaced
            peer.settimeout(60)
            ends.append(peer.recv(2**16)[:12])
        assert ends == [b"", b"", b"HTTP/1.1 408"] * 6

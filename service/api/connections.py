"""The server's TCP connections: their number is limited, and slow or vanished clients lose theirs.

A connection is idle while no request of it is complete: before its first one, between two, and while one is
being sent. Holding idle connections is cheap for a client, so they must not keep others out: beyond the
limit the one that has been idle longest is closed, first of those that never had a response. So clients that
get responses keep their connections, however many others are opened. All times and rates are in seconds and
bytes per second.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from itertools import chain
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from service.errors import HeadersTooLarge, ServiceError, TooManyConnections, status_of, to_body
from service.settings import Settings

log = logging.getLogger(__name__)

MAX_HEADER_BYTES, END_OF_HEADERS = 2**16, b"\r\n\r\n"
CHECKS_AT_ONCE = 100  # of connections, before other work has its turn
RETRY_SECONDS = 5  # Retry-After of a connection that finds no place
OTHER_FILES = 512  # open files beside connections: workers' sockets, weights, logs
# A peer that is gone without a word, such as a machine without power, is noticed within a minute.
PROBES = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}


@dataclass(frozen=True)
class ConnectionLimits:
    """count: open connections; header: time for a request's headers; idle: time between two requests.

    body, rate: a body of b bytes, of a request or a response, may take body + b / rate.
    """

    count: int
    header: float
    idle: float
    body: float
    rate: float

    @property
    def sweep(self) -> float:
        """The time between two checks of all connections."""
        return min(1.0, self.header / 4, self.idle / 4, self.body / 4)


def limits_of(settings: Settings) -> ConnectionLimits:
    """The limits of the settings, but no more connections than the process may open files.

    Raises the process's own limit of open files as far as necessary and allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + OTHER_FILES
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    count = min(settings.max_connections, max(allowed - OTHER_FILES, allowed // 2))
    if count < settings.max_connections:
        log.warning("at most %d connections, because the process may open only %d files", count, hard)
    seconds = settings.header_seconds, settings.idle_seconds, settings.body_seconds
    return ConnectionLimits(count, *seconds, settings.min_rate)


class CountedTransport:
    """A transport that counts the bytes written to it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        return self._transport.get_write_buffer_size()

    def end(self) -> None:
        """Close the connection at once, also if the client takes nothing more."""
        if self.unsent:
            self._transport.abort()
        else:
            self._transport.close()


@dataclass(eq=False)
class Connection:
    """What is known of a connection.

    idle_until: when it is closed unless a request begins; sent: bytes that the client had taken at the last
    check; credit: seconds that the client has left to take more; refused: it is closed soon, and what
    it sends until then is dropped: a client that still sends would lose the response if it were closed now.
    """

    protocol: Any  # uvicorn's, for one of several HTTP parsers
    transport: CountedTransport
    idle_until: float
    credit: float
    header_bytes: int = 0
    sent: int = 0
    refused: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether no complete request waits for its response."""
        cycle = self.protocol.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    @property
    def is_answered(self) -> bool:
        """Whether no request has complete headers and an incomplete response."""
        cycle = self.protocol.cycle
        return cycle is None or cycle.response_complete

    @property
    def in_headers(self) -> bool:
        """Whether the next bytes belong to the headers of a request, not to a body that nobody reads."""
        cycle = self.protocol.cycle
        return cycle is None or (cycle.response_complete and not cycle.more_body)


class Connections:
    """All open connections."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        # Those that have been idle longest first.
        self._unanswered: dict[asyncio.BaseProtocol, Connection] = {}  # that never had a response
        self._answered: dict[asyncio.BaseProtocol, Connection] = {}

    def __len__(self) -> int:
        return len(self._unanswered) + len(self._answered)

    def _find(self, protocol: asyncio.BaseProtocol) -> Connection | None:
        return self._unanswered.get(protocol) or self._answered.get(protocol)

    def add(self, protocol: asyncio.BaseProtocol, transport: CountedTransport, now: float) -> bool:
        """Count a new connection; False if there is no place for it."""
        if len(self) >= self.limits.count and not self._end_longest_idle():
            return False
        until = now + self.limits.header
        self._unanswered[protocol] = Connection(protocol, transport, until, self.limits.body)
        return True

    def _end_longest_idle(self) -> bool:
        candidates = chain(self._unanswered.values(), self._answered.values())
        connection = next((each for each in candidates if each.is_idle), None)
        if connection:
            self._end(connection)
        return connection is not None

    def renew(self, protocol: asyncio.BaseProtocol, now: float) -> None:
        """Note that a response is complete: its connection is idle from now on."""
        if connection := self._find(protocol):
            self.remove(protocol)
            limits = self.limits
            connection.idle_until = now + (
                limits.idle + limits.header if connection.in_headers else limits.body
            )
            connection.header_bytes = 0
            self._answered[protocol] = connection

    def remove(self, protocol: asyncio.BaseProtocol) -> None:
        self._unanswered.pop(protocol, None)
        self._answered.pop(protocol, None)

    def admits(self, protocol: asyncio.BaseProtocol, data: bytes) -> bool:
        """Whether a request goes on with this data; one with too large headers gets a 431."""
        connection = self._find(protocol)
        if connection is None or connection.refused:
            return False
        if connection.in_headers:
            end = data.find(END_OF_HEADERS)
            connection.header_bytes += len(data) if end < 0 else end
            if connection.header_bytes > MAX_HEADER_BYTES:
                connection.refused = True
                connection.transport.write(refusal(HeadersTooLarge()))
                connection.transport.write_eof()
                return False
        return True

    async def sweep(self, now: float) -> None:
        """Close the connections that were idle too long, or whose clients take their responses too slowly."""
        for number, connection in enumerate([*self._unanswered.values(), *self._answered.values()]):
            if number % CHECKS_AT_ONCE == 0:
                await asyncio.sleep(0)  # so that requests go on while thousands are closed
            late = connection.is_answered and now >= connection.idle_until
            if late or self._takes_too_long(connection):
                self._end(connection)

    def _takes_too_long(self, connection: Connection) -> bool:
        limits, transport = self.limits, connection.transport
        before, connection.sent = connection.sent, transport.written - transport.unsent
        if not transport.unsent:
            connection.credit = limits.body
            return False
        gained = (connection.sent - before) / limits.rate
        connection.credit = min(limits.body, connection.credit + gained - limits.sweep)
        return connection.credit <= 0

    def _end(self, connection: Connection) -> None:
        self.remove(connection.protocol)
        connection.transport.end()

    async def watch(self) -> None:
        """Check all connections at intervals, without end."""
        while True:
            await asyncio.sleep(self.limits.sweep)
            await self.sweep(asyncio.get_running_loop().time())


def protocol_of(connections: Connections) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, whose connections are counted and watched."""
    base: Any = AutoHTTPProtocol

    class Watched(base):  # type: ignore[misc]  # the class depends on which HTTP parser is installed
        def connection_made(self, transport: asyncio.Transport) -> None:
            counted = CountedTransport(transport)
            super().connection_made(counted)
            self.timeout_keep_alive = connections.limits.idle
            if connections.add(self, counted, self.loop.time()):
                probe(transport)
            else:
                transport.write(refusal(TooManyConnections(retry_after=RETRY_SECONDS)))
                transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            connections.remove(self)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if connections.admits(self, data):
                super().data_received(data)

        def on_response_complete(self) -> None:
            connections.renew(self, self.loop.time())
            super().on_response_complete()

    return Watched


def probe(transport: asyncio.Transport) -> None:
    """Have the kernel check whether the peer still exists."""
    opened: socket.socket | None = transport.get_extra_info("socket")
    if opened is None or opened.family not in (socket.AF_INET, socket.AF_INET6):
        return
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if option := getattr(socket, name, None):  # not on every system
            opened.setsockopt(socket.IPPROTO_TCP, option, value)


def refusal(error: ServiceError) -> bytes:
    """The response to a connection or request that does not reach the application."""
    body, status = json.dumps(to_body(error, uuid.uuid4().hex)), HTTPStatus(status_of(error))
    retry = "" if error.retry_after is None else f"retry-after: {error.retry_after}\r\n"
    return (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n{retry}"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}"
    ).encode()

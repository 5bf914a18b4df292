"""Middleware: request ids and logging, HEAD and OPTIONS, and limits on request bodies."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import QueueFull, ServiceError, Stalled, TooLarge, code_of, status_of, to_body
from service.logs import request_id as current_request_id
from service.metrics import Metrics
from service.tracing import RequestTrace, Tracing

log = logging.getLogger(__name__)

SMALL_BODY_BYTES = 2**16  # bodies up to this size are accepted however much memory other bodies take
RETRY_SECONDS = 5  # Retry-After of a body that finds no memory
CLIENT_GONE_STATUS = 499
METRIC_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # others count as OTHER
BODY_HEADERS = (b"content-type", b"content-length", b"transfer-encoding")
CONNECTION_CLOSE = (b"connection", b"close")
# Clients poll these routes or fetch many files from them, so they are logged at level debug.
QUIET_ROUTES = ("/health", "/health/live", "/health/ready", "/metrics", "/page/{name}")
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def header(scope: Scope, name: bytes) -> str:
    """A request header, or ''."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


async def send_error(send: Send, error: ServiceError, request_id: str) -> None:
    """Send a complete error response."""
    body = json.dumps(to_body(error, request_id)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})


class RequestContext:
    """Gives each request an id, counts and logs its response, and answers 500 to unhandled exceptions.

    leaving: whether the service is about to stop. Connections are then closed after their next response.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, leaving: Callable[[], bool], tracing: Tracing) -> None:
        self.app = app
        self.metrics = metrics
        self.leaving = leaving
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        with self.tracing.request(scope) as trace:
            await self._answer(scope, receive, send, trace)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, trace: RequestTrace | None) -> None:
        client_id = header(scope, b"x-request-id")
        request_id = client_id if SAFE_ID.fullmatch(client_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        token, begin, status = current_request_id.set(request_id), time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", request_id.encode())]
                more += [CONNECTION_CLOSE] if self.leaving() else []
                more += [trace.header] if trace else []
                message["headers"] = [*message["headers"], *more]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("unhandled exception in a request")
            if status:
                raise
            await send_error(send_with_id, ServiceError(), request_id)
        finally:
            self._record(scope, status, time.perf_counter() - begin, trace)
            current_request_id.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float, trace: RequestTrace | None) -> None:
        """Count and log a response; status 0: the client left before the response began."""
        route = getattr(scope.get("route"), "path", None)  # not the path, which may be any text
        method = scope["method"] if scope["method"] in METRIC_METHODS else "OTHER"
        status = status or CLIENT_GONE_STATUS
        if trace:
            trace.end(route, status)
        self.metrics.requests.labels(method, route or "none", str(status)).inc()
        facts = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
        if code := scope["state"].get("error_code"):
            facts["code"] = code
        level = logging.DEBUG if route in QUIET_ROUTES else logging.INFO
        log.log(level, "%s %s %d %.3f s", method, route, status, seconds, extra=facts)


class HeadSent(Exception):  # noqa: N818 - it ends a streamed response and is no error
    """The response to a HEAD request is complete, so the application stops here."""


class PathPrefix:
    """Serves all paths below a prefix, whether or not a reverse proxy has removed it from the path."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app = app
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            whole = path if f"{path}/".startswith(f"{self.prefix}/") else self.prefix + path
            scope = {**scope, "root_path": self.prefix, "path": whole}
        await self.app(scope, receive, send)


class HeadAndOptions:
    """Answers HEAD as GET without a body, and OPTIONS with the methods of the path.

    methods_of: the methods of a request's path, none if the path does not exist.
    """

    def __init__(self, app: ASGIApp, methods_of: Callable[[Scope], Collection[str]]) -> None:
        self.app = app
        self.methods_of = methods_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self._head(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "OPTIONS" and self._methods(scope):
            allow = (b"allow", ", ".join(self._methods(scope)).encode())
            await send({"type": "http.response.start", "status": 204, "headers": [allow]})
            await send({"type": "http.response.body"})
        else:
            await self.app(scope, receive, send)

    def _methods(self, scope: Scope) -> Collection[str]:
        return METRIC_METHODS if scope["path"] == "*" else self.methods_of(scope)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request as GET, send the headers, and drop the body; a streamed body stops at once."""

        async def send_headers(message: Message) -> None:
            scope["method"] = "HEAD"  # the server reads it: it must not write the end of a chunked body
            if message["type"] != "http.response.body":
                return await send(message)
            await send({"type": "http.response.body"})
            raise HeadSent

        scope["method"] = "GET"
        try:
            await self.app(scope, receive, send_headers)
        except HeadSent:
            pass
        finally:
            scope["method"] = "HEAD"


class BodyLimit:
    """Reads the whole body before the application sees the request, and limits its size.

    limit: bytes of one body. total_limit: bytes of all large bodies together, because a body is read before
    its request has a slot in the queue. Small bodies are always accepted, so that slow senders of large ones
    cannot block them. A body of b bytes may take seconds + b / rate. admits: whether a request may send a
    body; otherwise the application gets an empty body and refuses the request itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int,
        total_limit: int,
        seconds: float,
        rate: float,
        metrics: Metrics,
        admits: Callable[[Scope], bool],
    ) -> None:
        self.app = app
        self.limit = limit
        self.total_limit = total_limit
        self.seconds = seconds
        self.rate = rate
        self.metrics = metrics
        self.admits = admits
        self.held = 0  # bytes of all bodies at this moment

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not self.admits(scope):
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in BODY_HEADERS]
            return await self._forward(scope, receive, send, b"")
        body = bytearray()
        try:
            complete = await self._read(scope, receive, body)
        except ServiceError as error:
            scope["state"]["error_code"] = code_of(error)
            self.metrics.rejected.labels(code_of(error)).inc()
            return await send_error(send, error, scope["state"]["request_id"])
        else:
            if complete:
                await self._forward(scope, receive, send, bytes(body))
        finally:
            self.held -= len(body)

    async def _forward(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Call the application with a body that has been read."""
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_body, send)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Fill `body`; False if the client left before its end. Raises TooLarge, QueueFull or Stalled."""
        length = header(scope, b"content-length")
        if length.isdecimal() and int(length) > self.limit:
            raise self._too_large()
        begin = asyncio.get_running_loop().time()
        while True:
            try:
                async with asyncio.timeout_at(begin + self.seconds + len(body) / self.rate):
                    message = await receive()
            except TimeoutError:
                raise Stalled from None
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            body += chunk
            self.held += len(chunk)
            if len(body) > self.limit:
                raise self._too_large()
            if len(body) > SMALL_BODY_BYTES and self.held > self.total_limit:
                raise QueueFull(retry_after=RETRY_SECONDS)
            if not message.get("more_body"):
                return True

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body must be at most {self.limit} bytes")

"""What every request passes through: its id and its line in the log, the body limit, the last resort."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import QueueFull, ServiceError, Stalled, TooLarge, code_of, status_of, to_body
from service.logs import request_id as id_of_now
from service.metrics import Metrics

log = logging.getLogger(__name__)

SMALL = 2**16  # bytes of a body that hardly counts
RETRY_SECONDS = 5
SILENCE_SECONDS = 30.0  # in the middle of a body, after which the room that it holds is for others
GONE = 499  # the status of an answer that nobody waited for
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # the others may say anything
OF_BODIES = (b"content-type", b"content-length", b"transfer-encoding")
CLOSE = (b"connection", b"close")
WATCHED = ("/health", "/health/live", "/health/ready", "/metrics")  # asked so often that they fill a log
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def header(scope: Scope, name: bytes) -> str:
    """A request header, or ''."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


async def send_error(send: Send, error: ServiceError, request_id: str) -> None:
    """The error body as a whole answer."""
    body = json.dumps(to_body(error, request_id)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})


class RequestContext:
    """Gives each request an id, counts and logs its answer, and makes a plain 500 of what nobody caught.

    leaving: whether the service is about to stop, and so each connection ends with its answer.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, leaving: Callable[[], bool]) -> None:
        self.app = app
        self.metrics = metrics
        self.leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        theirs = header(scope, b"x-request-id")
        request_id = theirs if SAFE_ID.fullmatch(theirs) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        token, begin, status = id_of_now.set(request_id), time.perf_counter(), 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode())]
                message["headers"] = [*message["headers"], *own, *([CLOSE] if self.leaving() else [])]
            await send(message)

        try:
            await self.app(scope, receive, tagged)
        except Exception:
            log.exception("a request failed")
            if status:
                raise
            await send_error(tagged, ServiceError(), request_id)
        finally:
            self.note(scope, status, time.perf_counter() - begin)
            id_of_now.reset(token)

    def note(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log an answer; status 0: the client left before there was one."""
        route = getattr(scope.get("route"), "path", None)  # never the path itself, which may say anything
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        self.metrics.requests.labels(method, route or "none", str(status or GONE)).inc()
        facts = {"method": method, "route": route, "status": status or GONE}
        facts["seconds"] = round(seconds, 4)
        if code := scope["state"].get("error_code"):
            facts["code"] = code
        level = logging.DEBUG if route in WATCHED else logging.INFO
        log.log(level, "%s %s %d %.3f s", method, route, status or GONE, seconds, extra=facts)


class BodyLimit:
    """Takes the body in before the app sees it, however it is framed.

    limit: bytes of one body; room: bytes of all large ones together, since a body comes before there is a
    place in the queue for it. The small ones always find room, lest those who send slowly shut out the rest.
    admits: whose body is taken at all; for the app, the others have sent none, and it refuses them by itself.
    """

    def __init__(
        self, app: ASGIApp, limit: int, room: int, metrics: Metrics, admits: Callable[[Scope], bool]
    ) -> None:
        self.app = app
        self.admits = admits
        self.limit = limit
        self.room = room
        self.metrics = metrics
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not self.admits(scope):
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in OF_BODIES]
            return await self._pass_on(scope, receive, send, b"")
        body = bytearray()
        try:
            whole = await self._read(scope, receive, body)
        except ServiceError as error:
            scope["state"]["error_code"] = code_of(error)
            self.metrics.rejected.labels(code_of(error)).inc()
            return await send_error(send, error, scope["state"]["request_id"])
        else:
            if whole:  # else the client left in the middle
                await self._pass_on(scope, receive, send, bytes(body))
        finally:
            self.held -= len(body)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """Fill `body`; whether it came to its end. Raises TooLarge, QueueFull or Stalled."""
        length = header(scope, b"content-length")
        if length.isdecimal() and int(length) > self.limit:
            raise self._too_large()
        while True:
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
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
            if len(body) > SMALL and self.held > self.room:
                raise QueueFull(retry_after=RETRY_SECONDS)
            if not message.get("more_body"):
                return True

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body must be at most {self.limit} bytes")

"""API keys in requests, and the limit of requests for each. app.py decides which routes need a key."""

from __future__ import annotations

import base64
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.middleware import send_error
from service.errors import Forbidden, RateLimited, Unauthorized, code_of
from service.keys.keys import Keys
from service.keys.quotas import Caller, Quotas, headers_of
from service.metrics import Metrics

# For the OpenAPI document only; Identify reads the headers.
bearer = HTTPBearer(auto_error=False, description="An API key; needed if the service has keys.")
header = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same key in another header.")


REFUSED = 429  # the status of requests beyond a limit


class Identify:
    """Finds out whose request it is: `caller` in the request's state, None if it lacks a key that it needs.

    A key comes as `Authorization: Bearer KEY`, as `X-API-Key: KEY`, or as the password of `Authorization:
    Basic`, the only form that clients of AUTOMATIC1111's API can send. A POST request counts for the key's
    requests a minute, and is refused here, before its body is read. Responses to requests that counted for a
    quota have the fields RateLimit-Policy and RateLimit.
    """

    def __init__(self, app: ASGIApp, keys: Keys, quotas: Quotas, metrics: Metrics) -> None:
        self.app = app
        self.keys = keys
        self.quotas = quotas
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        client, state = self.keys.find(credentials_in(scope)), scope["state"]
        state["caller"] = None
        if client is None:
            return await self.app(scope, receive, send)
        state["caller"] = caller = Caller(client, state["request_id"])
        self.metrics.key_requests.labels(client.name).inc()

        async def send_with_quotas(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers_of(caller.verdicts.values())]
                if message["status"] == REFUSED:
                    self.metrics.refused(client.name, state["error_code"])
            await send(message)

        try:
            if scope["method"] == "POST":
                await self.quotas.take_request(caller)
        except RateLimited as error:
            state["error_code"] = code_of(error)
            self.metrics.rejected.labels(code_of(error)).inc()
            return await send_error(send_with_quotas, error, caller.request_id)
        await self.app(scope, receive, send_with_quotas)


def credentials_in(scope: Scope) -> list[bytes]:
    """All credentials in a request's headers that may be an API key."""
    plain = [value.strip() for name, value in scope["headers"] if name == b"x-api-key"]
    pairs = (value.split(None, 1) for name, value in scope["headers"] if name == b"authorization")
    schemes = [(pair[0].lower(), pair[1].strip()) for pair in pairs if len(pair) == 2]
    passwords = [password_in(value) for scheme, value in schemes if scheme == b"basic"]
    return plain + [value for scheme, value in schemes if scheme == b"bearer"] + passwords


def password_in(credentials: bytes) -> bytes:
    """The password of `user:password` in base64; if malformed, empty, which is never a key."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def caller_of(request: Request) -> Caller:
    """Whose request it is. Raises Unauthorized for a request without a key that it needs."""
    caller: Caller | None = request.state.caller
    if caller is None:
        raise Unauthorized
    return caller


async def require_key(
    request: Request,
    _bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    _header: Annotated[str | None, Depends(header)],
) -> None:
    """Raise Unauthorized for a request without a key."""
    caller_of(request)


async def require_admin_key(
    request: Request,
    _bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    _header: Annotated[str | None, Depends(header)],
) -> None:
    """Raise Unauthorized for a request without a key, and Forbidden for one with an ordinary key."""
    client = caller_of(request).client
    if not client.admin:
        raise Unauthorized if client.is_anonymous else Forbidden

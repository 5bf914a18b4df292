"""Route classes: limits of JSON bodies, and the field names of an API in its errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.params import Form
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from service.errors import InvalidRequest, UnreadableBody, UnsupportedMedia
from service.requests.validation_errors import explain

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

# Bytes that start or separate JSON values. Their number bounds time and memory of parsing. Base64 contains
# none of them.
JSON_SEPARATORS = (b",", b"[", b"{", b'"')
MAX_JSON_SEPARATORS = 100_000
# Other names of JSON. Browsers ask before they send these, as for application/json.
JSON_TYPES = re.compile(rb"\s*(text/(x-)?json|application/x-json)\s*(;.*)?", re.IGNORECASE | re.DOTALL)


class JSONRoute(APIRoute):
    """Accepts JSON without a Content-Type or by another name; refuses compressed and very large JSON."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()
        if self.body_field is None or isinstance(self.body_field.field_info, Form):
            return handle

        async def handler(request: Request) -> Response:
            if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
                raise UnsupportedMedia("the body must be sent without Content-Encoding")
            normalize_content_type(request)
            body = await request.body()
            if sum(map(body.count, JSON_SEPARATORS)) > MAX_JSON_SEPARATORS:
                raise UnreadableBody("the body has too many values")
            return await handle(request)

        return handler


def normalize_content_type(request: Request) -> None:
    """Treat other names of JSON as application/json, and a missing one unless the body comes from a web page.

    Before they send JSON to another server, browsers ask it for permission (CORS). Without a Content-Type
    they do not ask, so a body with an Origin header is not treated as JSON.
    """
    headers: list[tuple[bytes, bytes]] = request.scope["headers"]
    if not {b"content-type", b"origin"} & {name for name, _ in headers}:
        headers.append((b"content-type", b"application/json"))
    for index, (name, value) in enumerate(headers):
        if name == b"content-type" and JSON_TYPES.fullmatch(value):
            headers[index] = (name, b"application/json")


class ClientErrorRoute(JSONRoute):
    """A route of an API that imitates another one: its errors use the names of that API.

    field_names: field of the native API -> field of this API. invalid: the class of error that replaces
    InvalidRequest.
    """

    field_names: ClassVar[Mapping[str, str]] = {}
    invalid: ClassVar[type[InvalidRequest]] = InvalidRequest

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            content_type = request.headers.get("content-type", "")
            try:
                return await handle(request)
            except RequestValidationError as error:  # has the names of this API already
                raise self.as_invalid(explain(error.errors(), content_type)) from None
            except HTTPException as error:
                if error.status_code == 400 and content_type.startswith("multipart/"):
                    raise UnreadableBody("the form is incomplete") from None
                raise
            except InvalidRequest as error:
                raise self.as_invalid(self.renamed(error)) from None

        return handler

    def renamed(self, error: InvalidRequest) -> InvalidRequest:
        """The error, with this API's name of the field."""
        ours, theirs = error.param or "", self.field_names.get(error.param or "")
        if theirs is None:
            return error
        return type(error)(theirs + error.message.removeprefix(ours), param=theirs)

    def as_invalid(self, error: InvalidRequest) -> InvalidRequest:
        """The error as this API's class of error, unless it is about the body as a whole."""
        kind = self.invalid if type(error) is InvalidRequest else type(error)
        return kind(error.message, param=error.param)

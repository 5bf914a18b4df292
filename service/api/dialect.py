"""Routes of other APIs: the same errors, in their words."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from service.errors import InvalidRequest, UnreadableBody
from service.requests.validation_errors import explain

BROKEN_FORM = "the body must be a whole form"


class DialectRoute(APIRoute):
    """words: our fields -> that API's; invalid: what it calls a request that cannot be done."""

    words: ClassVar[Mapping[str, str]] = {}
    invalid: ClassVar[type[InvalidRequest]] = InvalidRequest

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                content_type = request.headers.get("content-type", "")
                raise self.translate(explain(error.errors(), content_type)) from None
            except HTTPException as error:
                form = request.headers.get("content-type", "").startswith("multipart/")
                raise UnreadableBody(BROKEN_FORM) if form and error.status_code == 400 else error from None
            except InvalidRequest as error:
                raise self.translate(error) from None

        return handler

    def translate(self, error: InvalidRequest) -> InvalidRequest:
        """The error as that API's clients expect it; one that is not about a value stays what it is."""
        kind = self.invalid if type(error) is InvalidRequest else type(error)
        theirs = self.words.get(error.param or "")
        message = f"{theirs}: {error.message}" if theirs else error.message
        return kind(message, param=theirs or error.param)

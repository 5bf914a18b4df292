"""POST /preprocess: a control image from a photograph, without the worker."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from service.api.auth import caller_of
from service.api.native import IMAGE_RESPONSE, Accept
from service.api.routing import JSONRoute
from service.requests import controls, images, response
from service.requests.control_schemas import PreprocessRequest, PreprocessResponse
from service.requests.images import MEDIA_TYPES
from service.requests.resolve import OutputFormat
from service.requests.response_schemas import error_responses
from service.settings import Settings

router = APIRouter(tags=["native"], route_class=JSONRoute)

IMAGE = {
    "description": "The control image; with `Accept: image/png` (or jpeg, webp), the image itself",
    "content": IMAGE_RESPONSE["content"],
}
RESPONSES: dict[str, Any] = {
    "response_model": PreprocessResponse,
    "responses": {200: IMAGE, **error_responses(400, 406, 408, 413, 415, 422, 429, 500, 503)},
}


@router.post("/preprocess", **RESPONSES, summary="Make a control image")
async def preprocess(
    body: PreprocessRequest, request: Request, accept: Accept = None
) -> PreprocessResponse | Response:
    """Returns the control image, of the size of `image`, that a request with the same `preprocess` would use.

    Preprocessors that are trained networks are not available: send their result as the control's image.
    """
    state = request.app.state
    output = response.negotiate(accept)
    with state.supervisor.reserve_slot(caller_of(request).client):
        return await asyncio.to_thread(respond, body, state.settings, output)


def respond(
    body: PreprocessRequest, settings: Settings, output: OutputFormat | None
) -> PreprocessResponse | Response:
    image = controls.preprocessed(body, settings)
    kind = output.format if output else "png"
    file = images.encode(np.asarray(image), kind)
    if output:
        return Response(file, media_type=MEDIA_TYPES[kind])
    return PreprocessResponse(
        data=base64.b64encode(file).decode(),
        media_type=MEDIA_TYPES[kind],
        width=image.width,
        height=image.height,
    )

"""POST /preprocess: a control image from a photograph, without the worker."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from service.api.routing import JSONRoute
from service.requests import controls, images
from service.requests.control_schemas import PreprocessRequest, PreprocessResponse
from service.requests.images import MEDIA_TYPES
from service.requests.schemas import error_responses
from service.settings import Settings

router = APIRouter(tags=["native"], route_class=JSONRoute)

RESPONSES: dict[str, Any] = {"responses": error_responses(400, 408, 413, 415, 422, 429, 500, 503)}


@router.post("/preprocess", **RESPONSES, summary="Make a control image")
async def preprocess(body: PreprocessRequest, request: Request) -> PreprocessResponse:
    """Returns the control image, of the size of `image`, that a request with the same `preprocess` would use.

    Preprocessors that are trained networks are not available: send their result as the control's image.
    """
    state = request.app.state
    with state.supervisor.reserve_slot():
        return await asyncio.to_thread(respond, body, state.settings)


def respond(body: PreprocessRequest, settings: Settings) -> PreprocessResponse:
    image = controls.preprocessed(body, settings)
    file = images.encode(np.asarray(image), "png")
    return PreprocessResponse(
        data=base64.b64encode(file).decode(),
        media_type=MEDIA_TYPES["png"],
        width=image.width,
        height=image.height,
    )

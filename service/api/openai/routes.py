"""The OpenAI Images API, on the same jobs: /v1/images/generations, edits and variations, and /v1/models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.api import native
from service.api.jobs import LIVE
from service.api.openai import translate
from service.api.openai.schemas import (
    ImageEdit,
    ImageGeneration,
    ImagesResponse,
    ImageVariation,
    OpenAIModel,
    OpenAIModelList,
    PromptedRequest,
)
from service.api.routing import ClientErrorRoute
from service.errors import BadRequest, NotFound
from service.requests.background import Record, Submission
from service.requests.schemas import ErrorBody, GenerateRequest, InpaintRequest, error_responses


class Route(ClientErrorRoute):
    """What is invalid is a 400, and called by this API's names."""

    field_names = {"width": "size", "height": "size", "init_image": "image"}  # noqa: RUF012 - a ClassVar there
    invalid = BadRequest


router = APIRouter(prefix="/v1", tags=["openai"], route_class=Route)

EVENTS: dict[str, Any] = {
    "description": "With `stream`: server-sent events `*.partial_image`, then `*.completed` or `error`",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
# Said, or the framework adds a 422, which there is none of here.
OTHER: dict[str, Any] = {"default": {"model": ErrorBody, "description": "Any other error"}}
MAKES: dict[str, Any] = {
    "response_model": ImagesResponse,
    "responses": {200: EVENTS, **error_responses(400, 404, 408, 413, 415, 429, 500, 503, 504, 507), **OTHER},
}


class Followed(StreamingResponse):
    """A job's events; the job is given up when its reader leaves."""

    def __init__(self, record: Record, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=LIVE)
        self.record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.record.work.cancel()


@router.post("/images/generations", **MAKES, summary="OpenAI: a picture of a prompt")
async def create_image(body: ImageGeneration, request: Request) -> ImagesResponse | StreamingResponse:
    """Of `quality`, `background` and the like, only values that change nothing are taken."""
    return await answer(body, lambda: translate.from_generation(body), request, "image_generation")


@router.post("/images/edits", **MAKES, summary="OpenAI: a picture from a picture, or a part of it anew")
async def edit_image(
    body: Annotated[ImageEdit, Form(media_type="multipart/form-data")], request: Request
) -> ImagesResponse | StreamingResponse:
    """With a mask, what is fully transparent in it is painted anew and the rest comes back as it was sent.

    Without one the whole picture is the start of a run; `strength` says how much of it may change.
    """
    max_pixels = request.app.state.settings.max_input_pixels
    return await answer(body, lambda: translate.from_edit(body, max_pixels), request, "image_edit")


@router.post("/images/variations", **MAKES, summary="OpenAI: another picture like a picture")
async def vary_image(
    body: Annotated[ImageVariation, Form(media_type="multipart/form-data")], request: Request
) -> ImagesResponse:
    """A run from the picture without a prompt; `strength` says how much of it may change."""
    made = await native.run(request, lambda: Submission(translate.from_variation(body)))
    return translate.to_answer(await made.as_json())


async def answer(
    body: PromptedRequest,
    translated: Callable[[], GenerateRequest | InpaintRequest],
    request: Request,
    prefix: str,
) -> ImagesResponse | StreamingResponse:
    """The images when they are done, or their events from now on."""
    if not body.stream:
        made = await native.run(request, lambda: Submission(translated()))
        return translate.to_answer(await made.as_json())
    state = request.app.state

    def prepare() -> Submission:
        wanted = translated()
        return Submission(wanted, previews=translate.previews_of(body, wanted, state.supervisor.specs))

    record = await state.jobs.start(prepare, request.state.request_id)
    return Followed(record, translate.events(record, prefix, body.partial_images or 0))


@router.get("/models", responses=error_responses(500, 503), summary="OpenAI: the models that make pictures")
async def list_openai_models(request: Request) -> OpenAIModelList:
    """All but those that only enlarge pictures."""
    state = request.app.state
    state.supervisor.check_open()
    names = [name for name, spec in state.supervisor.specs.items() if translate.able(spec)]
    return OpenAIModelList(data=[OpenAIModel(id=name, created=state.started) for name in names])


@router.get(
    "/models/{model}", responses=error_responses(404, 500, 503) | OTHER, summary="OpenAI: one of them"
)
async def read_openai_model(model: str, request: Request) -> OpenAIModel:
    """404 for what is not in the list."""
    known = await list_openai_models(request)
    for entry in known.data:
        if entry.id == model:
            return entry
    raise NotFound("model: there is no such model", param="model")

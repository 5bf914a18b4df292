"""The OpenAI Images API: /v1/images/generations, /edits and /variations, and /v1/models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import StreamingResponse

from service.api import native
from service.api.auth import caller_of
from service.api.openai.events import CancelOnDisconnect, Prefix, events
from service.api.openai.kept_files import KeptFiles
from service.api.openai.model_names import find_served_name, list_names
from service.api.openai.schemas import (
    ImageEdit,
    ImageGeneration,
    ImagesResponse,
    ImageVariation,
    OpenAIModel,
    OpenAIModelList,
    OpenAIRequest,
    PromptedRequest,
)
from service.api.openai.translate import Translator, to_response
from service.api.routing import ClientErrorRoute
from service.api.urls import base_url
from service.errors import BadRequest, InvalidRequest, NotFound, UnsupportedMedia
from service.requests.background import Jobs, Submission
from service.requests.response_schemas import ErrorBody, error_responses

FORM = "multipart/form-data"


class OpenAIRoute(ClientErrorRoute):
    """Reports invalid requests as 400, with the field names of this API."""

    field_names = {"width": "size", "height": "size", "init_image": "image"}  # noqa: RUF012 - a ClassVar there
    invalid = BadRequest

    def as_invalid(self, error: InvalidRequest) -> InvalidRequest:
        """As the base class, but `image[].0` in pydantic's errors is `image` for clients."""
        field = (error.param or "").removesuffix(".0").removesuffix("[]")
        if error.param and field in ("image", "mask"):
            error = type(error)(field + error.message.removeprefix(error.param), param=field)
        return super().as_invalid(error)


async def require_form(request: Request) -> None:
    """Raise UnsupportedMedia for a body that is not a form."""
    if not request.headers.get("content-type", "").startswith(FORM):
        raise UnsupportedMedia(f"the body must be sent with content-type {FORM}")


router = APIRouter(prefix="/v1", tags=["openai"], route_class=OpenAIRoute)
# Clients fetch the URLs in responses without an API key, so access is granted by the unguessable name. The
# route is not in the OpenAPI document, because clients never build its URLs themselves.
file_router = APIRouter(prefix="/v1", include_in_schema=False)

EVENT_STREAM: dict[str, Any] = {
    "description": "With `stream`: server-sent events `*.partial_image`, then `*.completed` or `error`",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
# Without a default response, the framework documents a 422, which this API never sends.
OTHER_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "Any other error"}
}
GENERATE_RESPONSES: dict[str, Any] = {
    "response_model": ImagesResponse,
    "response_model_exclude_none": True,
    "responses": {
        200: EVENT_STREAM,
        **error_responses(400, 404, 408, 413, 415, 429, 500, 503, 504, 507),
        **OTHER_ERRORS,
    },
}


@router.post("/images/generations", **GENERATE_RESPONSES, summary="OpenAI: generate images from a prompt")
async def create_image(body: ImageGeneration, request: Request) -> ImagesResponse | StreamingResponse:
    """Generates images from a prompt.

    Fields without a meaning for latent diffusion models, such as `quality` and `style`, are accepted and
    listed in `warnings`. Any other unsupported value that would change the image gets a 400.
    """
    translator = translator_of(request)
    return await answer(body, lambda: translator.generation(body), request, "image_generation")


@router.post(
    "/images/edits",
    **GENERATE_RESPONSES,
    dependencies=[Depends(require_form)],
    summary="OpenAI: edit an image, or a part of it",
)
async def edit_image(
    body: Annotated[ImageEdit, Form(media_type=FORM)], request: Request
) -> ImagesResponse | StreamingResponse:
    """Edits an image.

    With a mask, or if the image has fully transparent pixels, the marked pixels are repainted and all others
    are returned unchanged. Otherwise the whole image may change, as much as `strength` allows.
    """
    translator = translator_of(request)
    return await answer(body, lambda: translator.edit(body), request, "image_edit")


@router.post(
    "/images/variations",
    **GENERATE_RESPONSES,
    dependencies=[Depends(require_form)],
    summary="OpenAI: vary an image",
)
async def vary_image(
    body: Annotated[ImageVariation, Form(media_type=FORM)], request: Request
) -> ImagesResponse:
    """Varies an image without a prompt, as much as `strength` allows."""
    translator = translator_of(request)
    return await finished(body, lambda: translator.variation(body), request)


async def answer(
    body: PromptedRequest, prepare: Callable[[], Submission], request: Request, prefix: Prefix
) -> ImagesResponse | StreamingResponse:
    """The finished images, or with `stream` the events of their job."""
    if not body.stream:
        return await finished(body, prepare, request)
    jobs: Jobs = request.app.state.jobs
    record = await jobs.start(prepare, caller_of(request))
    return CancelOnDisconnect(record, events(record, prefix, body.partial_images or 0))


async def finished(
    body: OpenAIRequest, prepare: Callable[[], Submission], request: Request
) -> ImagesResponse:
    """The response with the finished images."""
    made = await native.run(request, prepare)
    files: KeptFiles = request.app.state.openai_files

    def url_of(file: bytes) -> str:
        name = files.keep(file, made.resolved.format)
        return f"{base_url(request)}{file_router.url_path_for('read_image_file', name=name)}"

    return to_response(body, made, url_of)


def translator_of(request: Request) -> Translator:
    state = request.app.state
    return Translator(state.supervisor.specs, state.openai_aliases, state.settings)


@file_router.get("/images/files/{name}")
async def read_image_file(name: str, request: Request) -> Response:
    """Returns the image of a `url` in a response, for a limited time; needs no API key."""
    files: KeptFiles = request.app.state.openai_files
    file = files.find(name)
    headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
    return Response(file.content, media_type=file.media_type, headers=headers)


@router.get("/models", responses=error_responses(500, 503), summary="OpenAI: list models")
async def list_openai_models(request: Request) -> OpenAIModelList:
    """Lists the models that generate images, and their aliases, without upscalers."""
    state = request.app.state
    state.supervisor.check_open()
    names = list_names(state.supervisor.specs, state.openai_aliases)
    return OpenAIModelList(data=[OpenAIModel(id=name, created=state.started) for name in names])


@router.get(
    "/models/{model}",
    responses=error_responses(404, 500, 503) | OTHER_ERRORS,
    summary="OpenAI: read a model",
)
async def read_openai_model(model: str, request: Request) -> OpenAIModel:
    """Describes a model, by any name that POST /v1/images/generations accepts."""
    state = request.app.state
    state.supervisor.check_open()
    specs, aliases = state.supervisor.specs, state.openai_aliases
    if find_served_name(model, "text-to-image", specs, aliases) not in list_names(specs, aliases):
        raise NotFound("model generates no images; GET /v1/models lists the models that do", param="model")
    return OpenAIModel(id=model, created=state.started)

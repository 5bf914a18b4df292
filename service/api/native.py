"""The native API: POST /generate, /inpaint and /upscale, GET /models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar, get_args

from fastapi import APIRouter, Header, Request, Response

from models.sampling.samplers import SAMPLERS, default_spacing
from models.spec import ModelSpec, Spacing
from service.api.auth import caller_of
from service.api.routing import JSONRoute
from service.engine.events import LoadedModel
from service.errors import ClientGone
from service.requests import labels, response
from service.requests.background import Jobs, Submission
from service.requests.extras import extras_of
from service.requests.images import MEDIA_TYPES
from service.requests.model_schemas import (
    Control,
    FewStepSettings,
    Label,
    Model,
    ModelDefaults,
    ModelLimits,
    ModelList,
    Upscaling,
    state_of,
)
from service.requests.response_schemas import GenerateResponse, error_responses
from service.requests.schemas import AnyRequest, GenerateRequest, InpaintRequest, UpscaleRequest
from service.settings import Settings
from service.worker.backend import Backend

router = APIRouter(tags=["native"], route_class=JSONRoute)

Result = TypeVar("Result")

GENERATE_ERRORS = (400, 404, 406, 408, 413, 415, 422, 429, 500, 503, 504, 507)
IMAGE_RESPONSE: dict[str, Any] = {
    "description": "The images; with `Accept: image/png` (or jpeg, webp) and n = 1, the image itself",
    "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()},
    "headers": {
        "X-Request-Id": {
            "schema": {"type": "string"},
            "description": "Identifies the request in logs and errors",
        },
        "X-Seed": {"schema": {"type": "integer"}, "description": "Seed of an image sent by itself"},
    },
}


GENERATE_RESPONSES: dict[str, Any] = {
    "response_model": GenerateResponse,
    "responses": {200: IMAGE_RESPONSE, **error_responses(*GENERATE_ERRORS)},
}
Accept = Annotated[str | None, Header(include_in_schema=False)]


@router.post(
    "/generate",
    **GENERATE_RESPONSES,
    summary="Generate images from a prompt or from an image",
)
async def generate(
    body: GenerateRequest, request: Request, accept: Accept = None
) -> GenerateResponse | Response:
    """Waits until the images are done. Closing the connection cancels the request."""
    return await answer(body, request, accept)


@router.post("/inpaint", **GENERATE_RESPONSES, summary="Repaint a part of an image")
async def inpaint(
    body: InpaintRequest, request: Request, accept: Accept = None
) -> GenerateResponse | Response:
    """Waits until the images, of the size of `image`, are done. Closing the connection cancels the request.

    Where the mask is black, an 8-bit RGB image comes back exactly as sent, in a lossless format. Transparent
    pixels of the input become white, 16-bit values keep their upper 8 bits, and the Exif orientation is
    applied.
    """
    return await answer(body, request, accept)


@router.post("/upscale", **GENERATE_RESPONSES, summary="Upscale an image")
async def upscale(
    body: UpscaleRequest, request: Request, accept: Accept = None
) -> GenerateResponse | Response:
    """Waits until the image, `scale` times the size of `image`, is done. Closing the connection cancels the
    request.

    A large image is processed in overlapping tiles, which are blended. Transparent pixels of the input become
    white, and the Exif orientation is applied.
    """
    return await answer(body, request, accept)


async def answer(body: AnyRequest, request: Request, accept: str | None) -> GenerateResponse | Response:
    """Run a request and answer with JSON, or with the image itself if the client accepts that."""
    output = response.negotiate(accept, body.output_format, body.n)
    made = await run(request, lambda: Submission(body, output))
    return made.as_image() if output else await made.as_json()


async def run(request: Request, prepare: Callable[[], Submission]) -> response.Answer:
    """Run a job while its client waits. prepare: as for Jobs.start().

    Raises the errors of Jobs.start(), and ClientGone if the client leaves.
    """
    jobs: Jobs = request.app.state.jobs
    return await while_connected(request, jobs.run(prepare, caller_of(request)))


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. If the client leaves, `work` is cancelled. Raises ClientGone."""
    task, gone = asyncio.create_task(work), asyncio.create_task(disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()


async def disconnect(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.get("/models", responses=error_responses(500, 503), summary="List the models")
async def list_models(request: Request) -> ModelList:
    """Each model: whether it is loaded, its tasks, defaults, limits and samplers."""
    supervisor: Backend = request.app.state.supervisor
    supervisor.check_open()
    specs, loaded = supervisor.specs, supervisor.models.loaded
    settings = supervisor.settings
    return ModelList(models=[describe(spec, settings, loaded(name)) for name, spec in specs.items()])


def describe(spec: ModelSpec, settings: Settings, loaded: LoadedModel | None = None) -> Model:
    """A model as GET /models describes it. loaded: None if it is not."""
    return Model(
        **dict(state_of(spec.name, loaded)),
        tasks=list(spec.tasks),
        inpainting=inpainting_of(spec),
        upscaling=spec.upscaling
        and Upscaling(scale=spec.autoencoder.factor, max_noise_level=spec.upscaling.max_noise_level),
        inputs=list(spec.inputs),
        guided=spec.guided,
        label_count=spec.label_count,
        labels=[
            Label(name=name, colour="#{:02x}{:02x}{:02x}".format(*labels.colour_of(number)))
            for number, name in enumerate(names_of(spec), 1)
        ],
        few_step=spec.few_step and FewStepSettings(**asdict(spec.few_step)),
        loras=list(spec.loras),
        lora_settings={
            name: FewStepSettings(**asdict(settings))
            for name, settings in zip(spec.loras, spec.lora_settings, strict=False)
            if settings
        },
        embeddings=list(spec.embeddings),
        decoders=["full", "tiny"] if spec.tiny_decoder else ["full"],
        extras=extras_of(spec),
        controls=[option.name for option in spec.controls],
        control_details=[
            Control(name=each.name, kind=each.kind, types=list(each.types), inpainting=each.inpainting)
            for each in spec.controls
        ],
        reference_adapters=list(spec.reference_adapters),
        defaults=ModelDefaults(
            **asdict(spec.defaults) | {"spacing": default_spacing(spec, spec.defaults.sampler)}
        ),
        limits=ModelLimits(
            size_multiple=spec.size_multiple,
            max_pixels=settings.max_input_pixels if spec.upscaling else settings.max_pixels,
            max_steps=spec.schedule.visited,
            max_n=settings.max_images,
            max_work=settings.max_work,
            max_clip_skip=spec.max_clip_skip,
        ),
        samplers=list(SAMPLERS),
        spacings=list(get_args(Spacing)),
    )


def names_of(spec: ModelSpec) -> Sequence[str]:
    """Names of the labels; their numbers if a segmentation model has no names for them."""
    if not spec.labels and "segmentation" in spec.inputs:
        return [str(number) for number in range(spec.label_count)]
    return spec.labels


def inpainting_of(spec: ModelSpec) -> Literal["mask channels", "blending"] | None:
    """How the model inpaints; None if it does not."""
    if "inpainting" not in spec.tasks:
        return None
    return "mask channels" if spec.mask_channels else "blending"

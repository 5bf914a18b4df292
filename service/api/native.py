"""The native API: POST /generate, /inpaint and /upscale, GET /models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar, get_args

from fastapi import APIRouter, Header, Request, Response

from models.sampling.samplers import SAMPLERS
from models.spec import ModelSpec, Spacing
from service.errors import ClientGone, DeadlineExceeded
from service.requests import labels, resolve, response
from service.requests.images import MEDIA_TYPES, Format
from service.requests.schemas import (
    GenerateRequest,
    GenerateResponse,
    InpaintRequest,
    Label,
    Model,
    ModelDefaults,
    ModelLimits,
    ModelList,
    PictureRequest,
    UpscaleRequest,
    Upscaling,
    error_responses,
)
from service.settings import Settings
from service.worker.supervisor import Supervisor

router = APIRouter(tags=["native"])

Result = TypeVar("Result")

MAKE_ERRORS = (400, 404, 406, 408, 413, 415, 422, 429, 500, 503, 504, 507)
PICTURE: dict[str, Any] = {
    "description": "The pictures; with `Accept: image/png` (or jpeg, webp) and n = 1 the picture itself",
    "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()},
    "headers": {
        "X-Request-Id": {"schema": {"type": "string"}, "description": "names the request in logs and errors"},
        "X-Seed": {"schema": {"type": "integer"}, "description": "of a picture by itself"},
    },
}


MAKES: dict[str, Any] = {
    "response_model": GenerateResponse,
    "responses": {200: PICTURE, **error_responses(*MAKE_ERRORS)},
}
Accept = Annotated[str | None, Header(include_in_schema=False)]


@router.post("/generate", **MAKES, summary="Make pictures from a prompt, and maybe from a picture")
async def generate(
    body: GenerateRequest, request: Request, accept: Accept = None
) -> GenerateResponse | Response:
    """Wait for the pictures. Leaving early cancels them."""
    return await answer(body, request, accept)


@router.post("/inpaint", **MAKES, summary="Paint a part of a picture anew")
async def inpaint(
    body: InpaintRequest, request: Request, accept: Accept = None
) -> GenerateResponse | Response:
    """Wait for the pictures, of the size of `image`; leaving early cancels them.

    Where the mask is black, an 8-bit RGB picture comes back as it was sent, bit for bit in a PNG. What is
    transparent in it becomes white, of 16 bits the upper 8 stay, and it is turned as its EXIF data say.
    """
    return await answer(body, request, accept)


@router.post("/upscale", **MAKES, summary="Enlarge a picture")
async def upscale(
    body: UpscaleRequest, request: Request, accept: Accept = None
) -> GenerateResponse | Response:
    """Wait for the picture, `scale` times the size of `image`; leaving early cancels it.

    Of a large picture, tiles are made that overlap and fade into each other. What is transparent in it
    becomes white, and it is turned as its EXIF data say.
    """
    return await answer(body, request, accept)


async def answer(body: PictureRequest, request: Request, accept: str | None) -> GenerateResponse | Response:
    """What all handlers that wait for pictures do. The place is held before anything costly happens."""
    begin = time.monotonic()
    state = request.app.state
    with state.supervisor.reserve_slot():
        bare = response.bare_format(accept, body)
        work = make(body, bare, state.supervisor, begin)
        made = await while_waited_for(request, work, body.timeout or state.settings.timeout)
        return made.as_picture() if bare else await made.as_json()


async def make(
    body: PictureRequest, bare: Format | None, supervisor: Supervisor, begin: float
) -> response.Answer:
    """The answer to a body, in the format of `bare` if it says one."""
    order = await asyncio.to_thread(resolve.to_order, body, supervisor.specs, supervisor.settings)
    order = resolve.with_format(order, bare, "Accept") if bare else order
    return await response.make(order, supervisor, begin)


async def while_waited_for(request: Request, work: Coroutine[Any, Any, Result], seconds: float) -> Result:
    """The result of `work`, cancelled when time is up (DeadlineExceeded) or the client goes (ClientGone)."""
    task, gone = asyncio.create_task(work), asyncio.create_task(disconnect(request))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone if gone.done() else DeadlineExceeded
    finally:
        task.cancel()
        gone.cancel()


async def disconnect(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.get("/models", responses=error_responses(500, 503), summary="What can be asked for")
async def list_models(request: Request) -> ModelList:
    """Each loaded model: its tasks, defaults, limits and samplers."""
    state = request.app.state
    state.supervisor.check_open()
    return ModelList(models=[describe(spec, state.settings) for spec in state.supervisor.specs.values()])


def describe(spec: ModelSpec, settings: Settings) -> Model:
    """What a client may want to know before it asks."""
    return Model(
        name=spec.name,
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
        loras=list(spec.loras),
        embeddings=list(spec.embeddings),
        defaults=ModelDefaults(**asdict(spec.defaults), spacing=spec.schedule.spacing),
        limits=ModelLimits(
            size_multiple=spec.size_multiple,
            max_pixels=settings.max_input_pixels if spec.upscaling else settings.max_pixels,
            max_steps=spec.schedule.timesteps,
            max_n=settings.max_images,
            max_work=settings.max_work,
        ),
        samplers=list(SAMPLERS),
        spacings=list(get_args(Spacing)),
    )


def names_of(spec: ModelSpec) -> Sequence[str]:
    """Of labels; numbers where a segmentation needs their colours, else none where they have none."""
    if not spec.labels and "segmentation" in spec.inputs:
        return [str(number) for number in range(spec.label_count)]
    return spec.labels


def inpainting_of(spec: ModelSpec) -> Literal["mask channels", "blending"] | None:
    """How the model inpaints, if it does."""
    if "inpainting" not in spec.tasks:
        return None
    return "mask channels" if spec.mask_channels else "blending"

"""The native API: POST /generate, GET /models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from models.samplers import SAMPLERS
from models.spec import ModelSpec
from service import answers, intake
from service.errors import ClientGone, DeadlineExceeded
from service.images import MEDIA_TYPES
from service.job import Done
from service.schemas import (
    GenerateRequest,
    GenerateResponse,
    Model,
    ModelDefaults,
    ModelLimits,
    ModelList,
    error_responses,
)
from service.settings import Settings

router = APIRouter(tags=["native"])

GENERATE_ERRORS = (400, 404, 406, 413, 415, 422, 429, 500, 503, 504, 507)
PICTURE: dict[str, Any] = {
    "description": "The pictures; with `Accept: image/png` (or jpeg, webp) and n = 1 the picture itself",
    "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()},
    "headers": {
        "X-Request-Id": {"schema": {"type": "string"}, "description": "names the request in logs and errors"},
        "X-Seed": {"schema": {"type": "integer"}, "description": "of a picture by itself"},
    },
}


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={200: PICTURE, **error_responses(*GENERATE_ERRORS)},
    summary="Make pictures from a prompt",
)
async def generate(
    body: GenerateRequest,
    request: Request,
    accept: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> GenerateResponse | Response:
    """Wait for the pictures. Leaving early cancels them."""
    begin = time.monotonic()
    state = request.app.state
    state.supervisor.check_open()
    bare = answers.bare_format(accept, body)
    job = intake.to_job(body, state.supervisor.specs, state.settings)
    with state.supervisor.place():
        seconds = body.timeout or state.settings.timeout
        done = await while_waited_for(request, state.supervisor.run(job), seconds)
        kind = bare or body.output_format or "png"
        files = await answers.files(job, done, kind)
        timings = answers.timings(done, time.monotonic() - begin)
        state.metrics.answered(job.n, timings)
        if bare:
            return Response(files[0], media_type=MEDIA_TYPES[bare], headers={"X-Seed": str(job.seed)})
        return await answers.as_json(job, done, files, kind, timings)


async def while_waited_for(request: Request, work: Coroutine[Any, Any, Done], seconds: float) -> Done:
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
        defaults=ModelDefaults(**asdict(spec.defaults)),
        limits=ModelLimits(
            size_multiple=spec.size_multiple,
            max_pixels=settings.max_pixels,
            max_steps=spec.schedule.timesteps,
            max_n=settings.max_images,
            max_work=settings.max_work,
        ),
        samplers=list(SAMPLERS),
    )

"""AUTOMATIC1111's API, on the same jobs: /sdapi/v1."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request

from service.api import native
from service.api.a1111 import translate
from service.api.a1111.schemas import (
    Embeddings,
    ExtraResult,
    ExtraSingleImage,
    ImageToImage,
    LoRAItem,
    Made,
    Memory,
    NewOptions,
    Options,
    Processing,
    ProgressAnswer,
    SamplerItem,
    SchedulerItem,
    ScriptsList,
    SDModel,
    TextToImage,
    UpscalerItem,
)
from service.api.a1111.translate import RESAMPLING, SAMPLERS, SCHEDULERS, Desk, Enlarging, Sampling
from service.api.dialect import DialectRoute
from service.requests.background import Submission
from service.requests.checks import require
from service.requests.resolve import coalesce
from service.requests.schemas import error_responses


class Route(DialectRoute):
    """Errors by this API's names."""

    words = {  # noqa: RUF012 - a ClassVar there
        "model": "sd_model_checkpoint",
        "guidance_scale": "cfg_scale",
        "n": "batch_size",
        "strength": "denoising_strength",
        "init_image": "init_images",
        "scale": "upscaling_resize",
        "loras": "prompt",
    }


router = APIRouter(prefix="/sdapi/v1", tags=["a1111"], route_class=Route)

MAKES: dict[str, Any] = {
    "responses": error_responses(400, 404, 408, 413, 415, 422, 429, 499, 500, 503, 504, 507)
}
TELLS: dict[str, Any] = {"responses": error_responses(422, 500, 503)}


def desk_of(request: Request) -> Desk:
    return request.app.state.desk


@router.post("/txt2img", **MAKES, summary="A1111: pictures of a prompt")
async def txt2img(body: TextToImage, request: Request) -> Made:
    """What is not served takes the values that change nothing; the rest is a 422."""
    sampling, desk = translate.sampling_of(body), desk_of(request)
    return await answer(body, sampling, lambda: translate.text_submission(body, sampling, desk), request)


@router.post("/img2img", **MAKES, summary="A1111: pictures from a picture, or a part of it anew")
async def img2img(body: ImageToImage, request: Request) -> Made:
    """With a mask, its blurred edge fades from what is painted to the picture."""
    sampling, desk = translate.sampling_of(body), desk_of(request)
    return await answer(body, sampling, lambda: translate.image_submission(body, sampling, desk), request)


async def answer(
    body: Processing, sampling: Sampling, prepare: Callable[[], Submission], request: Request
) -> Made:
    """The images when they are done; leaving early cancels them."""
    work = desk_of(request).make(prepare, request.state.request_id)
    made = await native.while_connected(request, work)
    return await asyncio.to_thread(translate.to_made, body, sampling, made)


@router.post("/extra-single-image", **MAKES, summary="A1111: enlarge a picture")
async def extra_single_image(body: ExtraSingleImage, request: Request) -> ExtraResult:
    """By a model of `upscalers`, or by resampling; "None" gives the picture back as it is."""
    state, name = request.app.state, coalesce(body.upscaler_1, "None")
    state.supervisor.check_open()
    known = translate.upscalers(state.supervisor.specs)
    require([("upscaler_1", name in known, f"must be one of {', '.join(known)}")])
    with state.supervisor.reserve_slot():
        wanted = await asyncio.to_thread(translate.enlarging_of, body, state.settings)
        file = await asyncio.to_thread(resampled, name, wanted)
    file = file or await enlarged(body, wanted, request)
    return ExtraResult(image=base64.b64encode(file).decode())


def resampled(name: str, wanted: Enlarging) -> bytes | None:
    """The file, where no model is needed for it."""
    if name == "None":
        return translate.png_of(wanted.picture)
    if name in RESAMPLING or wanted.scale <= 1:
        return wanted.finish(wanted.picture, RESAMPLING.get(name, RESAMPLING["Lanczos"]))
    return None


async def enlarged(body: ExtraSingleImage, wanted: Enlarging, request: Request) -> bytes:
    """The file, by a model."""
    work = desk_of(request).make(lambda: translate.upscale_submission(body, wanted), request.state.request_id)
    return (await native.while_connected(request, work)).files[0]


@router.get("/progress", **TELLS, summary="A1111: how far the oldest request is")
async def progress(request: Request, skip_current_image: bool = False) -> ProgressAnswer:
    """Of this API's requests; where several are under way, the one that came first."""
    return await desk_of(request).progress(not skip_current_image)


@router.post("/interrupt", **TELLS, summary="A1111: give up the oldest request")
async def interrupt(request: Request) -> None:
    """The one that progress shows; whoever waits for it gets a 499."""
    desk_of(request).interrupt()


@router.get("/options", **TELLS, summary="A1111: the options that there are")
async def read_options(request: Request) -> Options:
    """The model of requests that name none, and what is always so."""
    return desk_of(request).options()


@router.post(
    "/options",
    responses=error_responses(400, 404, 408, 413, 415, 422, 429, 500, 503),
    summary="A1111: choose the model",
)
async def write_options(body: NewOptions, request: Request) -> None:
    """`sd_model_checkpoint` is that of all requests of this API that name none, until the service ends."""
    if body.sd_model_checkpoint is not None:
        desk_of(request).choose(body.sd_model_checkpoint)


@router.get("/sd-models", **TELLS, summary="A1111: the models that make pictures")
async def list_checkpoints(request: Request) -> list[SDModel]:
    """Their names, as titles and files too."""
    names = desk_of(request).specs
    return [SDModel(title=name, model_name=name, filename=name) for name in names]


@router.post("/refresh-checkpoints", **TELLS, summary="A1111: nothing; models are named at start-up")
async def refresh_checkpoints() -> None:
    """Answers as if they had been read again."""


@router.get("/samplers", **TELLS, summary="A1111: its names of our samplers")
async def list_samplers() -> list[SamplerItem]:
    """Each may be followed by a scheduler's name."""
    return [SamplerItem(name=name, aliases=list(row.aliases)) for name, row in SAMPLERS.items()]


@router.get("/schedulers", **TELLS, summary="A1111: where steps can lie")
async def list_schedulers() -> list[SchedulerItem]:
    """Not each of them goes with each sampler."""
    return [
        SchedulerItem(name=name, label=row.label, aliases=list(row.aliases))
        for name, row in SCHEDULERS.items()
    ]


@router.get("/upscalers", **TELLS, summary="A1111: what enlarges pictures")
async def list_upscalers(request: Request) -> list[UpscalerItem]:
    """Resampling, and the models that enlarge."""
    state = request.app.state
    state.supervisor.check_open()
    specs = state.supervisor.specs
    scales = {name: spec.autoencoder.factor for name, spec in specs.items() if translate.is_upscaler(spec)}
    return [UpscalerItem(name=name, scale=scales.get(name, 4)) for name in translate.upscalers(specs)]


@router.get("/loras", **TELLS, summary="A1111: what <lora:name:weight> can name")
async def list_a1111_loras(request: Request) -> list[LoRAItem]:
    """Of all models."""
    names = {name for spec in desk_of(request).specs.values() for name in spec.loras}
    return [LoRAItem(name=name, alias=name, path=name) for name in sorted(names)]


@router.get("/scripts", **TELLS, summary="A1111: no scripts")
async def list_scripts() -> ScriptsList:
    """Clients ask at start, to know which extensions there are."""
    return ScriptsList()


@router.get("/embeddings", **TELLS, summary="A1111: no embeddings")
async def list_embeddings() -> Embeddings:
    """None are read."""
    return Embeddings()


@router.get("/cmd-flags", **TELLS, summary="A1111: no flags")
async def read_cmd_flags() -> dict[str, str]:
    """The flags of this service's command line are its operator's."""
    return {}


@router.get("/memory", **TELLS, summary="A1111: not measured here")
async def read_memory() -> Memory:
    """In that API's own words for a measure that fails."""
    return Memory()


async def none_of_these() -> list[str]:
    """There are none."""
    return []


for kind in (
    "hypernetworks",
    "face-restorers",
    "realesrgan-models",
    "prompt-styles",
    "sd-vae",
    "latent-upscale-modes",
):
    router.add_api_route(
        f"/{kind}", none_of_these, name=f"list_{kind.replace('-', '_')}", summary=f"A1111: no {kind}", **TELLS
    )

"""The API of AUTOMATIC1111's web UI (/sdapi/v1), on the same jobs as the native API."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request

from service.api import native
from service.api.a1111 import extras, infotext, translate
from service.api.a1111.options import NEUTRAL_IMG2IMG, NEUTRAL_SAMPLER, check_options, read_format, read_text
from service.api.a1111.samplers import SAMPLERS, SCHEDULERS, choose_sampler
from service.api.a1111.schemas import (
    EmbeddingItem,
    Embeddings,
    Empty,
    ExtraBatchImages,
    ExtraBatchResponse,
    Extras,
    ExtraSingleImage,
    ExtraSingleResponse,
    ImageToImage,
    LoRAItem,
    Memory,
    Options,
    OptionsUpdate,
    PNGInfo,
    PNGInfoResponse,
    ProcessingResponse,
    ProgressResponse,
    SamplerItem,
    SchedulerItem,
    ScriptsList,
    SDModel,
    TextToImage,
    UpscalerItem,
)
from service.api.a1111.session import A1111Session
from service.api.routing import ClientErrorRoute
from service.requests import images
from service.requests.background import Submission
from service.requests.response import Answer
from service.requests.schemas import error_responses
from service.worker.supervisor import Supervisor


class A1111Route(ClientErrorRoute):
    """Errors name A1111's fields."""

    field_names = {  # noqa: RUF012 - a ClassVar there
        "model": "override_settings.sd_model_checkpoint",
        "guidance_scale": "cfg_scale",
        "n": "batch_size",
        "strength": "denoising_strength",
        "sampler": "sampler_name",
        "init_image": "init_images",
        "output_format": "override_settings.samples_format",
        "scale": "upscaling_resize",
        "loras": "prompt",
        "lora_text_weights": "prompt",
    }


router = APIRouter(tags=["a1111"], route_class=A1111Route)
sdapi = APIRouter(prefix="/sdapi/v1", route_class=A1111Route)

GENERATE: dict[str, Any] = {
    "responses": error_responses(400, 404, 408, 413, 415, 422, 429, 499, 500, 503, 504, 507)
}
READ: dict[str, Any] = {"responses": error_responses(422, 500, 503)}
WRITE: dict[str, Any] = {"responses": error_responses(400, 404, 408, 413, 415, 422, 429, 500, 503)}


def session_of(request: Request) -> A1111Session:
    session: A1111Session = request.app.state.a1111
    return session


@sdapi.post("/txt2img", **GENERATE, summary="Text to image")
async def txt2img(body: TextToImage, request: Request) -> ProcessingResponse:
    """Generate images and wait for them. Fields that would change the images, and that are not supported,
    are a 422 unless their values change nothing; everything else that is unknown is ignored, with a sentence
    in `info.warnings`.
    """
    choice, session = choose_sampler(body), session_of(request)
    done = await run(lambda: translate.text_submission(body, choice, session), request)
    return await asyncio.to_thread(translate.to_response, body, choice, done)


@sdapi.post("/img2img", **GENERATE, summary="Image to image, and inpainting")
async def img2img(body: ImageToImage, request: Request) -> ProcessingResponse:
    """Generate images from an image and wait for them. With a mask, only what it marks is repainted, and its
    blurred edge fades into the original.
    """
    choice, session = choose_sampler(body), session_of(request)
    if body.denoising_strength == 0:
        with request.app.state.supervisor.reserve_slot():
            done = await asyncio.to_thread(translate.unchanged_answer, body, choice, session)
    else:
        done = await run(lambda: translate.image_submission(body, choice, session), request)
    return await asyncio.to_thread(translate.to_response, body, choice, done)


async def run(prepare: Callable[[], Submission], request: Request) -> Answer:
    """Run a job and wait for it; a client that leaves cancels it. prepare: as for Jobs.start()."""
    work = session_of(request).run(prepare, request.state.request_id)
    return await native.while_connected(request, work)


@sdapi.post("/extra-single-image", **GENERATE, summary="Upscale an image")
async def extra_single_image(body: ExtraSingleImage, request: Request) -> ExtraSingleResponse:
    """By a model from GET /sdapi/v1/upscalers, or by resampling; "None" returns the image as it is."""
    warnings = extras.check(body, open_supervisor(request).specs)
    file = await upscaled(body, body.image, "image", request)
    shown = "" if body.show_extras_results is False else base64.b64encode(file).decode()
    return ExtraSingleResponse(html_info=warnings, image=shown)


@sdapi.post("/extra-batch-images", **GENERATE, summary="Upscale several images")
async def extra_batch_images(body: ExtraBatchImages, request: Request) -> ExtraBatchResponse:
    """As extra-single-image, one image after the other."""
    warnings = extras.check(body, open_supervisor(request).specs)
    files = [
        await upscaled(body, entry.data, f"imageList.{index}.data", request)
        for index, entry in enumerate(body.imageList)
    ]
    shown = [] if body.show_extras_results is False else [base64.b64encode(file).decode() for file in files]
    return ExtraBatchResponse(html_info=warnings, images=shown)


async def upscaled(body: Extras, file: str, param: str, request: Request) -> bytes:
    """The finished file of an image, by a model; without one, or when interrupted, by resampling."""
    settings = request.app.state.settings
    if extras.needs_model(body):
        done = await run(lambda: extras.submission(body, file, param, settings), request)
        if done.files:
            return done.files[0]
    with request.app.state.supervisor.reserve_slot():
        return await asyncio.to_thread(extras.resample, body, file, param, settings)


def open_supervisor(request: Request) -> Supervisor:
    """The supervisor. Raises as Supervisor.check_open()."""
    supervisor: Supervisor = request.app.state.supervisor
    supervisor.check_open()
    return supervisor


@sdapi.post("/png-info", **GENERATE, summary="Read the parameters that an image file carries")
async def png_info(body: PNGInfo, request: Request) -> PNGInfoResponse:
    """Of a PNG, JPEG or WebP file made by this service or by A1111."""
    state = request.app.state

    def read() -> PNGInfoResponse:
        file = images.from_base64(body.image, "image")
        text, items = infotext.read(images.decode(file, "image", state.settings.max_input_pixels))
        return PNGInfoResponse(info=text, items=items, parameters=infotext.parameters_of(text))

    with state.supervisor.reserve_slot():
        return await asyncio.to_thread(read)


@sdapi.get("/progress", **READ, summary="Progress of the oldest request")
async def progress(request: Request, skip_current_image: bool = False) -> ProgressResponse:
    """Of the requests of this API; with the newest preview, unless it is to be skipped."""
    return await session_of(request).progress(not skip_current_image)


@sdapi.post("/interrupt", **READ, summary="Interrupt the oldest request")
async def interrupt(request: Request) -> Empty:
    """The one that GET /sdapi/v1/progress describes: it is answered at once, with its images as they are."""
    session_of(request).interrupt()
    return Empty()


@sdapi.post("/skip", **READ, summary="Interrupt the oldest request (as /interrupt)")
async def skip(request: Request) -> None:
    """A1111 would go on with the next batch; here all batches of a request run at the same time."""
    session_of(request).interrupt()


@sdapi.get("/options", **READ, summary="Options")
async def read_options(request: Request) -> Options:
    """The options that change images, at the values that are in effect."""
    return session_of(request).options()


@sdapi.post("/options", **WRITE, summary="Choose the model and the file format of later requests")
async def write_options(body: OptionsUpdate, request: Request) -> None:
    """Kept until the service ends. Options that this service does not have are ignored; those that would
    change images are a 422 unless their values change nothing.
    """
    session, values = session_of(request), body.model_dump(exclude_none=True)
    check_options(values, NEUTRAL_IMG2IMG, *NEUTRAL_SAMPLER.values())
    if read_format(values):
        session.format = values["samples_format"].lower()
    if name := read_text(values, "sd_model_checkpoint"):
        session.choose(name)


@sdapi.get("/sd-models", **READ, summary="Models that generate images")
async def list_checkpoints(request: Request) -> list[SDModel]:
    """Title, name and file name are the same here; hashes are not computed."""
    return [SDModel(title=name, model_name=name, filename=name) for name in session_of(request).specs]


@sdapi.get("/samplers", **READ, summary="Samplers")
async def list_samplers() -> list[SamplerItem]:
    """By A1111's names. A scheduler's name may follow: "DPM++ 2M Karras"."""
    return [SamplerItem(name=name, aliases=list(row.aliases)) for name, row in SAMPLERS.items()]


@sdapi.get("/schedulers", **READ, summary="Schedulers")
async def list_schedulers() -> list[SchedulerItem]:
    """DDIM, DDPM, PLMS, UniPC and LCM ignore them."""
    return [
        SchedulerItem(name=name, label=row.label, aliases=list(row.aliases))
        for name, row in SCHEDULERS.items()
    ]


@sdapi.get("/upscalers", **READ, summary="Upscalers")
async def list_upscalers(request: Request) -> list[UpscalerItem]:
    """Resampling, and the models that upscale."""
    specs = open_supervisor(request).specs
    scales = {name: spec.autoencoder.factor for name, spec in specs.items() if extras.is_upscaler(spec)}
    return [UpscalerItem(name=name, scale=scales.get(name, 4)) for name in extras.upscaler_names(specs)]


@sdapi.get("/loras", **READ, summary="LoRAs")
async def list_a1111_loras(request: Request) -> list[LoRAItem]:
    """Names that a prompt may use as <lora:name:weight>, of all models."""
    names = {name for spec in session_of(request).specs.values() for name in spec.loras}
    return [LoRAItem(name=name, alias=name, path=name) for name in sorted(names)]


@sdapi.get("/embeddings", **READ, summary="Textual inversion embeddings")
async def list_embeddings(request: Request) -> Embeddings:
    """`loaded`: those of the chosen model; `skipped`: those of other models."""
    session = session_of(request)
    specs, chosen = session.specs, session.options().sd_model_checkpoint
    tables: tuple[dict[str, EmbeddingItem], dict[str, EmbeddingItem]] = ({}, {})
    for model, spec in specs.items():
        width = sum(text.width for text in spec.texts)
        item = EmbeddingItem(shape=width, vectors=0)
        tables[model != chosen].update(dict.fromkeys(spec.embeddings, item))
    loaded, skipped = tables
    return Embeddings(
        loaded=loaded, skipped={name: item for name, item in skipped.items() if name not in loaded}
    )


@sdapi.get("/scripts", **READ, summary="Scripts (none)")
async def list_scripts() -> ScriptsList:
    """Clients read this at start to find extensions."""
    return ScriptsList()


@sdapi.get("/cmd-flags", **READ, summary="Command-line flags (not shown)")
async def read_cmd_flags() -> dict[str, str]:
    """The command line of this service is not shown to clients."""
    return {}


@sdapi.get("/memory", **READ, summary="Memory statistics (not available)")
async def read_memory() -> Memory:
    """In the form that A1111 uses when it cannot measure."""
    return Memory()


@router.get("/internal/ping", **READ, summary="Ping")
async def ping() -> Empty:
    """Answers while the process runs; GET /health/ready says whether it can generate images."""
    return Empty()


async def nothing() -> Empty:
    """Accepted for compatibility; has no effect."""
    return Empty()


async def empty_list() -> list[str]:
    """Always empty: this service has none."""
    return []


for path, what in (
    ("refresh-checkpoints", "Refresh checkpoints"),
    ("refresh-loras", "Refresh LoRAs"),
    ("refresh-vae", "Refresh VAEs"),
    ("unload-checkpoint", "Unload the checkpoint"),
    ("reload-checkpoint", "Reload the checkpoint"),
):
    sdapi.add_api_route(
        f"/{path}", nothing, methods=["POST"], name=path.replace("-", "_"), summary=f"{what} (no-op)", **READ
    )

for path, what in (
    ("hypernetworks", "Hypernetworks"),
    ("face-restorers", "Face restorers"),
    ("realesrgan-models", "Real-ESRGAN models"),
    ("prompt-styles", "Prompt styles"),
    ("sd-vae", "VAEs"),
    ("latent-upscale-modes", "Latent upscale modes"),
    ("script-info", "Arguments of scripts"),
    ("extensions", "Extensions"),
):
    name = f"list_{path.replace('-', '_')}"
    sdapi.add_api_route(f"/{path}", empty_list, name=name, summary=f"{what} (none)", **READ)

router.include_router(sdapi)

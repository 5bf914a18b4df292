"""The API of AUTOMATIC1111's web UI (/sdapi/v1), on the same jobs as the native API."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from fastapi import APIRouter, Request

from service.api import native
from service.api.a1111 import answers, controlnet_routes, extras, infotext, translate
from service.api.a1111.checks import CONTROLNET
from service.api.a1111.controlnet_units import names_of
from service.api.a1111.options import NEUTRAL_IMG2IMG, NEUTRAL_SAMPLER, check_options, read_format, read_text
from service.api.a1111.phases import UPSCALERS
from service.api.a1111.samplers import SAMPLERS, SCHEDULERS, SamplerChoice, choose_sampler
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
    LatentUpscaleMode,
    LoRAItem,
    Memory,
    Options,
    OptionsUpdate,
    PNGInfo,
    PNGInfoResponse,
    Processing,
    ProcessingResponse,
    ProgressResponse,
    SamplerItem,
    SchedulerItem,
    ScriptsList,
    SDModel,
    TextToImage,
    UpscalerItem,
    VAEItem,
)
from service.api.a1111.session import A1111Session, A1111Sessions
from service.api.auth import caller_of
from service.api.routing import ClientErrorRoute
from service.requests import images
from service.requests.background import Submission
from service.requests.metadata import read_parameters
from service.requests.response import Answer
from service.requests.response_schemas import error_responses
from service.worker.backend import Backend


class A1111Route(ClientErrorRoute):
    """A route whose errors use A1111's field names."""

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
        "image_guidance_scale": "image_cfg_scale",
        "decoder": "override_settings.sd_vae_decode_method",
        "clip_skip": "override_settings.CLIP_stop_at_last_layers",
        "hires": "enable_hr",
        "hires.scale": "hr_scale",
        "hires.width": "hr_resize_x",
        "hires.height": "hr_resize_y",
        "hires.upscaler": "hr_upscaler",
        "hires.steps": "hr_second_pass_steps",
        "hires.prompt": "hr_prompt",
        "hires.negative_prompt": "hr_negative_prompt",
        "refiner.model": "refiner_checkpoint",
        "refiner.switch_at": "refiner_switch_at",
        "variation.seed": "subseed",
        "variation.strength": "subseed_strength",
    }


router = APIRouter(tags=["a1111"], route_class=A1111Route)
sdapi = APIRouter(prefix="/sdapi/v1", route_class=A1111Route)
admin_router = APIRouter(prefix="/sdapi/v1", tags=["a1111"], route_class=A1111Route)  # needs an admin key

GENERATE: dict[str, Any] = {
    "responses": error_responses(400, 404, 408, 413, 415, 422, 429, 499, 500, 503, 504, 507)
}
READ: dict[str, Any] = {"responses": error_responses(422, 500, 503)}
ADMIN: dict[str, Any] = {"responses": error_responses(404, 409, 422, 499, 500, 503, 504, 507)}
WRITE: dict[str, Any] = {"responses": error_responses(400, 404, 408, 413, 415, 422, 429, 500, 503)}


def session_of(request: Request) -> A1111Session:
    """What the request's client sees of this API's state."""
    sessions: A1111Sessions = request.app.state.a1111
    return sessions.of(caller_of(request))


@sdapi.post("/txt2img", **GENERATE, summary="Text to image")
async def txt2img(body: TextToImage, request: Request) -> ProcessingResponse:
    """Generates images and waits for them. An unsupported field that would change the images gets a 422. All
    other unknown fields are ignored, with a warning in `info.warnings`.
    """
    choice, session = choose_sampler(body), session_of(request)
    done = await run(lambda: translate.text_submission(body, choice, session), request)
    return await asyncio.to_thread(respond, body, choice, done, session)


@sdapi.post("/img2img", **GENERATE, summary="Image to image, and inpainting")
async def img2img(body: ImageToImage, request: Request) -> ProcessingResponse:
    """Generates images from an image and waits for them. With a mask, only the marked pixels are repainted;
    at the mask's blurred edge the result fades into the original.
    """
    choice, session = choose_sampler(body), session_of(request)
    if body.denoising_strength == 0:
        with reserved_slot(request):
            done = await asyncio.to_thread(translate.unchanged_answer, body, choice, session)
    else:
        done = await run(lambda: translate.image_submission(body, choice, session), request)
    return await asyncio.to_thread(respond, body, choice, done, session)


def respond(
    body: Processing, choice: SamplerChoice, done: Answer, session: A1111Session
) -> ProcessingResponse:
    """The response; the control images follow the images, as A1111's extension does it."""
    return answers.to_response(body, choice, done, translate.control_maps(body, done, session))


async def run(prepare: Callable[[], Submission], request: Request) -> Answer:
    """Run a job and wait for it; it is cancelled if the client leaves. prepare: as for Jobs.start()."""
    work = session_of(request).run(prepare)
    return await native.while_connected(request, work)


@sdapi.post("/extra-single-image", **GENERATE, summary="Upscale an image")
async def extra_single_image(body: ExtraSingleImage, request: Request) -> ExtraSingleResponse:
    """Upscales with an upscaler from GET /sdapi/v1/upscalers; "None" returns the image unchanged."""
    warnings = extras.check(body, open_supervisor(request).specs)
    file = await upscaled(body, body.image, "image", request)
    shown = "" if body.show_extras_results is False else base64.b64encode(file).decode()
    return ExtraSingleResponse(html_info=warnings, image=shown)


@sdapi.post("/extra-batch-images", **GENERATE, summary="Upscale several images")
async def extra_batch_images(body: ExtraBatchImages, request: Request) -> ExtraBatchResponse:
    """Does the same as extra-single-image, one image after the other."""
    warnings = extras.check(body, open_supervisor(request).specs)
    files = [
        await upscaled(body, entry.data, f"imageList.{index}.data", request)
        for index, entry in enumerate(body.imageList)
    ]
    shown = [] if body.show_extras_results is False else [base64.b64encode(file).decode() for file in files]
    return ExtraBatchResponse(html_info=warnings, images=shown)


async def upscaled(body: Extras, file: str, param: str, request: Request) -> bytes:
    """The finished file: upscaled with a model, or resampled without a model and after an interrupt."""
    settings = request.app.state.settings
    if extras.needs_model(body):
        done = await run(lambda: extras.submission(body, file, param, settings), request)
        if done.files:
            return done.files[0]
    with reserved_slot(request):
        return await asyncio.to_thread(extras.resample, body, file, param, settings)


def reserved_slot(request: Request) -> AbstractContextManager[None]:
    """A slot of the queue for the request's client. Raises as Backend.reserve_slot() does."""
    supervisor: Backend = request.app.state.supervisor
    return supervisor.reserve_slot(caller_of(request).client)


def open_supervisor(request: Request) -> Backend:
    """The supervisor. Raises the errors of Backend.check_open()."""
    supervisor: Backend = request.app.state.supervisor
    supervisor.check_open()
    return supervisor


@sdapi.post("/png-info", **GENERATE, summary="Read the parameters in an image file")
async def png_info(body: PNGInfo, request: Request) -> PNGInfoResponse:
    """Reads PNG, JPEG and WebP files made by this service or by A1111."""
    state = request.app.state

    def read() -> PNGInfoResponse:
        file = images.from_base64(body.image, "image")
        text, items = read_parameters(images.decode(file, "image", state.settings.max_input_pixels))
        return PNGInfoResponse(info=text, items=items, parameters=infotext.parameters_of(text))

    with reserved_slot(request):
        return await asyncio.to_thread(read)


@sdapi.get("/progress", **READ, summary="Progress of the oldest request")
async def progress(request: Request, skip_current_image: bool = False) -> ProgressResponse:
    """Returns the progress of the oldest unfinished request of this API, with its newest preview unless
    `skip_current_image` is set. Where keys are set, of the oldest one with the same key, or for an admin key
    with any.
    """
    return await session_of(request).progress(not skip_current_image)


@sdapi.post("/interrupt", **READ, summary="Interrupt the oldest request")
async def interrupt(request: Request) -> Empty:
    """Interrupts the request that GET /sdapi/v1/progress describes: it is answered at once, with its images
    as they are. Requests with other keys go on, unless the key is an admin's.
    """
    session_of(request).interrupt()
    return Empty()


@sdapi.post("/skip", **READ, summary="Interrupt the oldest request (as /interrupt)")
async def skip(request: Request) -> None:
    """A1111 would continue with the next batch. Here all batches of a request run at the same time, so this
    ends the request.
    """
    session_of(request).interrupt()


@sdapi.get("/options", **READ, summary="Options")
async def read_options(request: Request) -> Options:
    """Lists the options that change images, with their current values."""
    return session_of(request).options()


@sdapi.post("/options", **WRITE, summary="Choose the model and the file format of later requests")
async def write_options(body: OptionsUpdate, request: Request) -> None:
    """The choice is kept until the service ends, and is that of the API key alone. Unsupported options that
    would change images get a 422; all other unknown options are ignored.
    """
    session, values = session_of(request), body.model_dump(exclude_none=True)
    check_options(values, NEUTRAL_IMG2IMG, *NEUTRAL_SAMPLER.values())
    if read_format(values):
        session.choice.format = values["samples_format"].lower()
    if name := read_text(values, "sd_model_checkpoint"):
        session.choose(name)


@sdapi.get("/sd-models", **READ, summary="Models that generate images")
async def list_checkpoints(request: Request) -> list[SDModel]:
    """Lists the models. Title, name and file name are the same; hashes are not computed."""
    return [SDModel(title=name, model_name=name, filename=name) for name in session_of(request).specs]


@sdapi.get("/samplers", **READ, summary="Samplers")
async def list_samplers() -> list[SamplerItem]:
    """Lists samplers by A1111's names. Requests may add a scheduler's name: "DPM++ 2M Karras"."""
    return [SamplerItem(name=name, aliases=list(row.aliases)) for name, row in SAMPLERS.items()]


@sdapi.get("/schedulers", **READ, summary="Schedulers")
async def list_schedulers() -> list[SchedulerItem]:
    """Lists schedulers. The samplers DDIM, DDPM, PLMS, UniPC and LCM ignore the scheduler."""
    return [
        SchedulerItem(name=name, label=row.label, aliases=list(row.aliases))
        for name, row in SCHEDULERS.items()
    ]


@sdapi.get("/latent-upscale-modes", **READ, summary="Upscalers of latents")
async def list_latent_upscale_modes() -> list[LatentUpscaleMode]:
    """The latent upscalers for `hr_upscaler`."""
    return [LatentUpscaleMode(name=name) for name in UPSCALERS if name.startswith("Latent")]


@sdapi.get("/upscalers", **READ, summary="Upscalers")
async def list_upscalers(request: Request) -> list[UpscalerItem]:
    """Lists the resampling methods, and the models that upscale."""
    specs = open_supervisor(request).specs
    scales = {name: spec.autoencoder.factor for name, spec in specs.items() if extras.is_upscaler(spec)}
    return [UpscalerItem(name=name, scale=scales.get(name, 4)) for name in extras.upscaler_names(specs)]


@sdapi.get("/loras", **READ, summary="LoRAs")
async def list_a1111_loras(request: Request) -> list[LoRAItem]:
    """Lists the LoRAs of all models; prompts use them as <lora:name:weight>."""
    names = {name for spec in session_of(request).specs.values() for name in spec.loras}
    return [LoRAItem(name=name, alias=name, path=name) for name in sorted(names)]


@sdapi.get("/embeddings", **READ, summary="Textual inversion embeddings")
async def list_embeddings(request: Request) -> Embeddings:
    """Lists embeddings: `loaded` are those of the selected model, `skipped` those of other models."""
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


@sdapi.get("/sd-vae", **READ, summary="VAEs")
async def list_vaes(request: Request) -> list[VAEItem]:
    """Lists the VAEs in the folders of models. One beside a model, named NAME.vae, belongs to that model."""
    catalogue = open_supervisor(request).models.catalogue
    return [VAEItem(model_name=entry.name, filename=entry.name) for entry in catalogue.of("vae")]


@sdapi.get("/scripts", **READ, summary="Scripts")
async def list_scripts(request: Request) -> ScriptsList:
    """Names `controlnet` if there is a control or reference adapter; clients read this to find extensions."""
    has_guides = any(names_of(spec) for spec in session_of(request).specs.values())
    names = [CONTROLNET] if has_guides else []
    return ScriptsList(txt2img=names, img2img=names)


@sdapi.get("/cmd-flags", **READ, summary="Command-line flags (not shown)")
async def read_cmd_flags() -> dict[str, str]:
    """Always empty: the command line of this service is not shown to clients."""
    return {}


@sdapi.get("/memory", **READ, summary="Memory statistics (not available)")
async def read_memory() -> Memory:
    """Returns the body that A1111 returns when it cannot measure memory."""
    return Memory()


@router.get("/internal/ping", **READ, summary="Ping")
async def ping() -> Empty:
    """Always answers; GET /health/ready reports whether the service can generate images."""
    return Empty()


async def rescan(request: Request) -> Empty:
    """Reads the folders of models again: checkpoints, LoRAs, embeddings and VAEs. As POST /models/rescan."""
    await native.while_connected(request, open_supervisor(request).rescan())
    return Empty()


async def unload_checkpoint(request: Request) -> Empty:
    """Unloads the selected model when no job uses it; a later request loads it again."""
    session = session_of(request)
    await native.while_connected(request, session.set_loaded(False))
    return Empty()


async def reload_checkpoint(request: Request) -> Empty:
    """Loads the selected model, if it is not loaded."""
    session = session_of(request)
    await native.while_connected(request, session.set_loaded(True))
    return Empty()


async def empty_list() -> list[str]:
    """Always empty: this service has none of these."""
    return []


for path, act, what in (
    ("refresh-checkpoints", rescan, "Find new checkpoints"),
    ("refresh-loras", rescan, "Find new LoRAs"),
    ("refresh-embeddings", rescan, "Find new embeddings"),
    ("refresh-vae", rescan, "Find new VAEs"),
    ("unload-checkpoint", unload_checkpoint, "Unload the selected model"),
    ("reload-checkpoint", reload_checkpoint, "Load the selected model"),
):
    name = path.replace("-", "_")
    admin_router.add_api_route(f"/{path}", act, methods=["POST"], name=name, summary=what, **ADMIN)

for path, what in (
    ("hypernetworks", "Hypernetworks"),
    ("face-restorers", "Face restorers"),
    ("realesrgan-models", "Real-ESRGAN models"),
    ("prompt-styles", "Prompt styles"),
    ("script-info", "Arguments of scripts"),
    ("extensions", "Extensions"),
):
    name = f"list_{path.replace('-', '_')}"
    sdapi.add_api_route(f"/{path}", empty_list, name=name, summary=f"{what} (none)", **READ)

router.include_router(sdapi)
router.include_router(controlnet_routes.router)

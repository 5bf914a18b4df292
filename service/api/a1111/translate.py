"""Between AUTOMATIC1111's API and ours: bodies to jobs, answers to its own, and what its clients share."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from models.spec import ModelSpec, Spacing
from service.api.a1111.masking import Masked, Region, png_of, put_back, region_of, soft_mask
from service.api.a1111.schemas import (
    ExtraSingleImage,
    ImageToImage,
    Info,
    Made,
    Options,
    Processing,
    ProgressAnswer,
    ProgressState,
)
from service.errors import ClientGone, InvalidRequest, NotFound
from service.requests import images, response
from service.requests.background import Jobs, Record, Submission
from service.requests.checks import reads_tokens, require
from service.requests.resolve import TASKS_OF, build_request, coalesce, find_model
from service.requests.resolved_request import Previews
from service.requests.response import Answer, Result
from service.requests.schemas import GenerateRequest, ImageRequest, InpaintRequest, UpscaleRequest
from service.settings import Settings

VERSION = "ldm"
PREVIEWS = Previews(every=10, format="png")  # steps; that API's default
STRENGTH, BLUR = 0.75, 4  # that API's defaults, of runs from pictures and of masks
DRAWN = 2**32  # seeds that are drawn are below it, where clients expect them
RESAMPLING = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
FORMATS = {"jpg": "jpeg"}
EXTRA_NETWORK = re.compile(r"<(\w+):([^<>]*)>")
WEIGHT = re.compile(r"(-?(\d+(\.\d+)?|\.\d+))?")  # each text in one way only: what is long takes no longer


@dataclass(frozen=True)
class Scheduler:
    """Where the steps of a run lie, by its names there."""

    label: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """One of its samplers: our sampler and spacing for each scheduler, None the model's spacing."""

    aliases: tuple[str, ...]
    ours: Mapping[str, tuple[str, Spacing | None]]


SCHEDULERS = {
    "automatic": Scheduler("Automatic"),
    "uniform": Scheduler("Uniform"),
    "karras": Scheduler("Karras"),
    "sgm_uniform": Scheduler("SGM Uniform", ("SGMUniform",)),
    "normal": Scheduler("Normal"),
}


def spaced(ours: str) -> dict[str, tuple[str, Spacing | None]]:
    return {
        "automatic": (ours, None),
        "uniform": (ours, "linspace"),
        "normal": (ours, "linspace"),
        "sgm_uniform": (ours, "trailing"),
    }


def alone(ours: str) -> dict[str, tuple[str, Spacing | None]]:
    return {"automatic": (ours, None)}


DPMPP_KARRAS = ("dpmpp_2m_karras", None)
SAMPLERS = {
    "DPM++ 2M": Sampler(
        ("k_dpmpp_2m",), spaced("dpmpp_2m") | {"karras": DPMPP_KARRAS, "automatic": DPMPP_KARRAS}
    ),
    "Euler a": Sampler(("k_euler_a", "k_euler_ancestral"), spaced("euler_ancestral")),
    "Euler": Sampler(("k_euler",), spaced("euler") | {"karras": ("euler_karras", None)}),
    "DDIM": Sampler(("ddim",), alone("ddim")),
    "DDPM": Sampler(("ddpm",), alone("ddpm")),
    "PLMS": Sampler(("plms",), alone("plms")),
    "UniPC": Sampler(("unipc",), alone("unipc")),
    "LCM": Sampler(("k_lcm",), alone("lcm")),
}
DEFAULT_SAMPLER = "Euler"
ANCESTRAL = ("Euler a",)

SAMPLER_NAMES = {
    spelling.lower(): name for name, row in SAMPLERS.items() for spelling in (name, *row.aliases)
}
SCHEDULER_NAMES = {
    spelling.lower(): name for name, row in SCHEDULERS.items() for spelling in (name, row.label, *row.aliases)
}


@dataclass(frozen=True)
class Sampling:
    """What a request asks for, in its words and in ours."""

    name: str
    scheduler: str
    sampler: str
    spacing: Spacing | None
    eta: float | None


def sampling_of(body: Processing) -> Sampling:
    """A scheduler may be the end of the sampler's name, as it once had to be. Raises InvalidRequest."""
    asked = (body.sampler_name or body.sampler_index or DEFAULT_SAMPLER).lower()
    scheduler = SCHEDULER_NAMES.get((body.scheduler or "automatic").lower())
    for spelling, known in SCHEDULER_NAMES.items():
        if asked.endswith(f" {spelling}") and asked not in SAMPLER_NAMES:
            asked, scheduler = asked.removesuffix(f" {spelling}"), known
    name = SAMPLER_NAMES.get(asked, "")
    offered = SAMPLERS[name].ours if name else {}
    require(
        (
            ("sampler_name", bool(name), f"must be one of {', '.join(SAMPLERS)}"),
            ("scheduler", scheduler in offered, f"must be one of {', '.join(offered)} with {name}"),
            ("eta", name not in ANCESTRAL or body.eta in (None, 1.0), f"must be 1 with {name}"),
        )
    )
    sampler, spacing = offered[scheduler]
    return Sampling(name, scheduler, sampler, spacing, body.eta if name == "DDIM" else None)


def split(prompt: str) -> tuple[str, dict[str, float]]:
    """(the prompt without <lora:name:weight>, weight by name). Raises InvalidRequest for other networks."""
    loras: dict[str, float] = {}
    for kind, told in EXTRA_NETWORK.findall(prompt):
        name, _, weight = told.partition(":")
        if kind != "lora" or not WEIGHT.fullmatch(weight):
            raise InvalidRequest("prompt must name extra networks as <lora:name:weight>", param="prompt")
        loras[name] = loras.get(name, 0.0) + float(weight or 1.0)
    return EXTRA_NETWORK.sub("", prompt), loras


def shared(body: Processing, sampling: Sampling, checkpoint: str | None) -> dict[str, Any]:
    """The fields of any request of ours, for the checks of its model. Raises InvalidRequest."""
    n = coalesce(body.batch_size, 1) * coalesce(body.n_iter, 1)
    prompt, loras = split(body.prompt or "")
    override = body.override_settings
    kind = override and override.samples_format
    return {
        "model": (override and override.sd_model_checkpoint) or checkpoint,
        "prompt": prompt if prompt.strip() else None,
        "negative_prompt": body.negative_prompt,
        "loras": loras or None,
        "seed": secrets.randbelow(max(1, DRAWN - n)) if body.seed in (None, -1) else body.seed,
        "n": n,
        "steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "sampler": sampling.sampler,
        "spacing": sampling.spacing,
        "eta": sampling.eta,
        "width": body.width,
        "height": body.height,
        "output_format": FORMATS.get(kind, kind),
    }


def reading(asked: Mapping[str, Any], kind: type[ImageRequest], desk: Desk) -> dict[str, Any]:
    """Prompts are read as there, weights and chunks and all, by models that are told every word."""
    spec = find_model(asked["model"], desk.specs, TASKS_OF[kind])
    return {"prompt_weights": True, "long_prompts": "chunk"} if reads_tokens(spec) else {}


def generate_submission(asked: dict[str, Any], desk: Desk) -> Submission:
    request = build_request(GenerateRequest, asked | reading(asked, GenerateRequest, desk))
    return Submission(request, previews=PREVIEWS)


def text_submission(body: Processing, sampling: Sampling, desk: Desk) -> Submission:
    """Raises InvalidRequest, and NotFound for the model."""
    return generate_submission(shared(body, sampling, desk.checkpoint), desk)


def image_submission(body: ImageToImage, sampling: Sampling, desk: Desk) -> Submission:
    """Decodes images where there is a mask, which takes a while. Raises as text_submission()."""
    settings = desk.jobs.supervisor.settings
    asked = shared(body, sampling, desk.checkpoint) | {
        "strength": coalesce(body.denoising_strength, STRENGTH)
    }
    if body.mask is None:
        return generate_submission(asked | {"init_image": body.init_images[0]}, desk)
    original = masked_of(body, settings.max_input_pixels)
    size = coalesce(body.width, original.picture.width), coalesce(body.height, original.picture.height)
    most = settings.max_pixels
    require([("width", size[0] * size[1] <= most, f"times height must be at most {most}")])
    region: Region | None = None
    if coalesce(body.inpaint_full_res, True):
        region = region_of(original.soft, coalesce(body.inpaint_full_res_padding, 0), *size)
        work = original.cropped(region).resized(*size)
    else:
        original = work = original.resized(*size)
    start = work.picture if body.inpainting_fill == 1 else work.filled()
    asked |= reading(asked, InpaintRequest, desk) | {"width": None, "height": None}
    request = build_request(InpaintRequest, asked | {"image": start, "mask": work.hole})
    paste = put_back(original, region)

    def encode(result: Result, index: int) -> bytes:
        whole = np.asarray(paste(Image.fromarray(result.pixels(index))))
        parameters = json.dumps(result.resolved.parameters.of_image(index))
        return images.encode(whole, result.resolved.format, parameters)

    return Submission(request, previews=PREVIEWS, encode=encode)


def masked_of(body: ImageToImage, max_pixels: int) -> Masked:
    """The picture and its blurred mask, white where to paint. Raises InvalidRequest."""
    picture = images.read_image(body.init_images[0], "init_images", max_pixels)
    mask = images.decode(images.from_base64(body.mask, "mask"), "mask", max_pixels)
    width, height = picture.size
    require([("mask", mask.size == picture.size, f"must have the size of the picture, {width}x{height}")])
    return Masked(picture, soft_mask(mask, body.inpainting_mask_invert == 1, coalesce(body.mask_blur, BLUR)))


def to_made(body: Processing, sampling: Sampling, answer: Answer) -> Made:
    """The answer in its words."""
    shown = {"init_images", "mask"} if not getattr(body, "include_init_images", None) else set()
    return Made(
        images=[base64.b64encode(file).decode() for file in answer.files],
        parameters=body.model_dump(mode="json", exclude=shown),
        info=info_of(body, sampling, answer).model_dump_json(),
    )


def info_of(body: Processing, sampling: Sampling, answer: Answer) -> Info:
    """Seeds, prompts and infotexts of all pictures."""
    resolved = answer.resolved
    job, n = resolved.parameters, resolved.parameters.n
    prompt, seeds = body.prompt or "", [job.seed + index for index in range(n)]
    return Info(
        prompt=prompt,
        all_prompts=[prompt] * n,
        negative_prompt=resolved.negative_prompt,
        all_negative_prompts=[resolved.negative_prompt] * n,
        seed=job.seed,
        all_seeds=seeds,
        subseed=job.seed,
        all_subseeds=seeds,
        width=resolved.width,
        height=resolved.height,
        sampler_name=sampling.name,
        cfg_scale=job.guidance_scale,
        steps=job.steps,
        batch_size=coalesce(body.batch_size, 1),
        sd_model_name=job.model,
        denoising_strength=strength_of(body),
        infotexts=[infotext(prompt, body, sampling, answer, seed) for seed in seeds],
        job_timestamp=stamp(answer.created),
        version=VERSION,
        warnings=list(answer.warnings),
    )


def strength_of(body: Processing) -> float | None:
    return coalesce(body.denoising_strength, STRENGTH) if isinstance(body, ImageToImage) else None


def infotext(prompt: str, body: Processing, sampling: Sampling, answer: Answer, seed: int) -> str:
    """What that program writes into its files: the prompts, then `name: value` by commas."""
    resolved = answer.resolved
    job = resolved.parameters
    values = {
        "Steps": job.steps,
        "Sampler": sampling.name,
        "Schedule type": SCHEDULERS[sampling.scheduler].label,
        "CFG scale": job.guidance_scale,
        "Seed": seed,
        "Size": f"{resolved.width}x{resolved.height}",
        "Model": job.model,
        "Denoising strength": strength_of(body),
        "Version": VERSION,
    }
    last = ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None)
    negative = [f"Negative prompt: {resolved.negative_prompt}"] if resolved.negative_prompt else []
    return "\n".join([prompt, *negative, last])


def stamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))


# Enlarging.


def is_upscaler(spec: ModelSpec) -> bool:
    return not {*TASKS_OF[UpscaleRequest]}.isdisjoint(spec.tasks)


def makes_pictures(spec: ModelSpec) -> bool:
    return not {*TASKS_OF[GenerateRequest], *TASKS_OF[InpaintRequest]}.isdisjoint(spec.tasks)


def upscalers(specs: Mapping[str, ModelSpec]) -> Sequence[str]:
    return ["None", *RESAMPLING, *(name for name, spec in specs.items() if is_upscaler(spec))]


@dataclass(frozen=True)
class Enlarging:
    """size: to resize to; window: of that, what is kept, about its middle; scale: from where to where."""

    picture: Image.Image
    size: tuple[int, int]
    window: tuple[int, int]
    scale: float

    def finish(self, picture: Image.Image, how: Image.Resampling = Image.Resampling.LANCZOS) -> bytes:
        """The file of the picture, however large it has become so far."""
        if picture.size != self.size:
            picture = picture.resize(self.size, how)
        (width, height), (w, h) = self.size, self.window
        left, upper = (width - w) // 2, (height - h) // 2
        return png_of(picture.crop((left, upper, left + w, upper + h)))


def enlarging_of(body: ExtraSingleImage, settings: Settings) -> Enlarging:
    """What is asked for; decodes the picture. Raises InvalidRequest."""
    picture = images.read_image(body.image, "image", settings.max_input_pixels)
    width, height = picture.size
    most = settings.max_input_pixels
    if body.resize_mode == 1:
        window = coalesce(body.upscaling_resize_w, 512), coalesce(body.upscaling_resize_h, 512)
        names = "upscaling_resize_w", "upscaling_resize_h"
        fits = [
            (name, side <= most, f"must be at most {most}") for name, side in zip(names, window, strict=True)
        ]
        require(fits)
        scale = max(window[0] / width, window[1] / height)
        size = max(window[0], round(width * scale)), max(window[1], round(height * scale))
        window = window if coalesce(body.upscaling_crop, True) else size
    else:
        scale = coalesce(body.upscaling_resize, 2.0)
        size = window = max(1, int(width * scale)), max(1, int(height * scale))
    require([("upscaling_resize", size[0] * size[1] <= most, f"must leave at most {most} pixels")])
    return Enlarging(picture, size, window, scale)


def upscale_submission(body: ExtraSingleImage, wanted: Enlarging) -> Submission:
    """By the next whole number; the rest is resampling. Raises InvalidRequest."""
    asked = {"image": wanted.picture, "model": body.upscaler_1, "scale": max(2, math.ceil(wanted.scale))}

    def encode(result: Result, index: int) -> bytes:
        return wanted.finish(Image.fromarray(result.pixels(index)))

    return Submission(build_request(UpscaleRequest, asked), encode=encode)


# What its clients share.


class Desk:
    """That program has one model and one request at a time, and its clients ask about those.

    Here they are the checkpoint of requests that name none, and the oldest request of this API under way.
    """

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self._chosen: str | None = None
        self._under_way: dict[str, Record] = {}  # the oldest first

    @property
    def specs(self) -> Mapping[str, ModelSpec]:
        """Of the models that make pictures. Raises as Supervisor.check_open()."""
        self.jobs.supervisor.check_open()
        return {name: spec for name, spec in self.jobs.supervisor.specs.items() if makes_pictures(spec)}

    @property
    def checkpoint(self) -> str | None:
        """The model of requests that name none; None: the first that does what is asked for."""
        return self._chosen

    def choose(self, name: str) -> None:
        """Raises NotFound."""
        if name not in self.specs:
            raise NotFound(
                f"sd_model_checkpoint must be one of {', '.join(self.specs)}", param="sd_model_checkpoint"
            )
        self._chosen = name

    def options(self) -> Options:
        return Options(sd_model_checkpoint=self._chosen or next(iter(self.specs), ""))

    async def make(self, prepare: Callable[[], Submission], request_id: str) -> Answer:
        """The answer; given up when this is cancelled. Raises as Jobs.start(), and ClientGone."""
        record = await self.jobs.start(prepare, request_id)
        record.awaited = True
        self._under_way[record.id] = record
        try:
            await asyncio.wait({record.work})
            if record.work.cancelled():
                raise ClientGone("the request was interrupted")
            return record.work.result()
        finally:
            del self._under_way[record.id]
            record.work.cancel()

    def _oldest(self) -> Record | None:
        return next(iter(self._under_way.values()), None)

    def interrupt(self) -> None:
        """Give up the request that progress() shows."""
        if record := self._oldest():
            record.work.cancel()

    async def progress(self, with_picture: bool) -> ProgressAnswer:
        """How far the oldest request is; all zeros without one."""
        record = self._oldest()
        if record is None:
            none = ProgressState(job="", job_count=0, job_timestamp="0", sampling_step=0, sampling_steps=0)
            return ProgressAnswer(progress=0.0, eta_relative=0.0, state=none)
        state, picture = record.progress.state, None
        if with_picture and state.preview:
            picture = (await asyncio.to_thread(response.to_job_preview, record.resolved, state.preview)).data
        done = state.step / state.steps if state.steps else 0.0
        left = (time.time() - record.created) * (1 / done - 1) if done else coalesce(state.estimate, 0.0)
        told = ProgressState(
            job=record.id,
            job_count=len(self._under_way),
            job_timestamp=stamp(record.created),
            sampling_step=state.step,
            sampling_steps=state.steps,
        )
        return ProgressAnswer(progress=done, eta_relative=left, state=told, current_image=picture)

"""Between the OpenAI Images API and ours: bodies to requests, answers and events to its own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import PIL.Image
from fastapi import UploadFile

from models.spec import ModelSpec
from service.api.openai.schemas import (
    CompletedImage,
    Image,
    ImageEdit,
    ImageEvent,
    ImageGeneration,
    ImageRequest,
    ImagesResponse,
    ImageVariation,
    PartialImage,
    PromptedRequest,
)
from service.errors import InvalidRequest
from service.requests import images
from service.requests.background import Record
from service.requests.checks import require
from service.requests.images import MEDIA_TYPES
from service.requests.resolve import DEFAULT_STRENGTH, TASKS_OF, build_request, coalesce, find_model
from service.requests.resolved_request import Previews
from service.requests.schemas import (
    GenerateRequest,
    GenerateResponse,
    InpaintRequest,
    JobPreview,
    JobStatus,
)

FORMATS = {media_type: kind for kind, media_type in MEDIA_TYPES.items()}


def shared(body: ImageRequest) -> dict[str, Any]:
    """The fields of any request of ours, for the checks of its model."""
    check(body)
    asked = {
        "model": body.model,
        "n": body.n,
        "seed": body.seed,
        "steps": coalesce(body.steps, body.num_inference_steps),
        "guidance_scale": body.guidance_scale,
        "negative_prompt": body.negative_prompt,
        "sampler": body.sampler,
    }
    if isinstance(body, PromptedRequest):
        asked |= {"prompt": body.prompt, "output_format": body.output_format}
    if body.size not in (None, "auto"):
        width, height = body.size.split("x")
        asked |= {"width": int(width), "height": int(height)}
    return asked


def check(body: ImageRequest) -> None:
    """Raise InvalidRequest for fields that do not go together."""
    rules = [
        (
            "num_inference_steps",
            body.steps is None or body.num_inference_steps in (None, body.steps),
            "must agree with steps",
        )
    ]
    if isinstance(body, PromptedRequest):
        rules += [
            ("n", not body.stream or body.n in (None, 1), "must be 1 with stream: events name no picture"),
            ("partial_images", bool(body.stream) or not body.partial_images, "must come with stream"),
        ]
    require(rules)


def from_generation(body: ImageGeneration) -> GenerateRequest:
    """A picture of a prompt."""
    return build_request(GenerateRequest, shared(body))


def from_edit(body: ImageEdit, max_pixels: int) -> GenerateRequest | InpaintRequest:
    """With a mask what is transparent in it is painted anew, without one the run starts from the picture."""
    pictures = [*body.image, *body.images]
    require(
        (
            ("image", bool(pictures), "is required"),
            ("image", len(pictures) == 1, "must be one picture: these models start from one"),
        )
    )
    picture = file_of(pictures[0])
    asked = shared(body) | {"strength": body.strength}
    if body.mask is None:
        return build_request(GenerateRequest, asked | {"init_image": picture})
    mask = hole_of(file_of(body.mask), max_pixels)
    return build_request(InpaintRequest, asked | {"image": picture, "mask": mask})


def from_variation(body: ImageVariation) -> GenerateRequest:
    """A run from the picture that is told nothing else."""
    picture = file_of(body.image)
    return build_request(GenerateRequest, shared(body) | {"strength": body.strength, "init_image": picture})


def file_of(upload: UploadFile) -> bytes:
    """The content of an uploaded file, which lies in memory or in a temporary file."""
    return upload.file.read()


def hole_of(file: bytes, max_pixels: int) -> PIL.Image.Image:
    """A mask of ours, white where theirs is fully transparent. Raises InvalidRequest."""
    picture = images.decode(file, "mask", max_pixels)
    if not picture.has_transparency_data:
        raise InvalidRequest("mask must be transparent where to paint anew; it has no alpha", param="mask")
    return picture.convert("RGBA").getchannel("A").point([255] + [0] * 255)


def able(spec: ModelSpec) -> bool:
    """Whether the model can be asked for anything here."""
    return bool({*TASKS_OF[GenerateRequest], *TASKS_OF[InpaintRequest]} & {*spec.tasks})


def to_answer(made: GenerateResponse) -> ImagesResponse:
    """The pictures in its words."""
    first = made.images[0]
    return ImagesResponse(
        created=made.created,
        data=[Image(b64_json=picture.data) for picture in made.images],
        output_format=FORMATS[first.media_type],
        size=f"{first.width}x{first.height}",
    )


def previews_of(
    body: PromptedRequest, wanted: GenerateRequest | InpaintRequest, specs: Mapping[str, ModelSpec]
) -> Previews:
    """As many previews as the client asks for, spread evenly. Raises NotFound for the model."""
    spec = find_model(wanted.model, specs, TASKS_OF[type(wanted)])
    from_picture = isinstance(wanted, GenerateRequest) and wanted.init_image is not None
    share = coalesce(wanted.strength, DEFAULT_STRENGTH if from_picture else 1.0)
    steps, partial = coalesce(wanted.steps, spec.defaults.steps) * share, body.partial_images or 0
    every = max(1, int(steps / (partial + 1))) if partial else 0
    return Previews(every, decoded=True, format=wanted.output_format or "png")


async def events(record: Record, prefix: str, partial_images: int) -> AsyncIterator[str]:
    """A job's events as text/event-stream, to the picture or the error that ends it."""
    shown = 0
    async for event in record.events():
        if event is None:
            yield ": still here\n\n"
            continue
        name, data = event
        if isinstance(data, JobPreview) and shown < partial_images:
            yield sent(partial_of(data, prefix, shown, int(record.created)))
            shown += 1
        elif name == "done":
            yield sent(completed_of(data.result, prefix))
        elif name in ("failed", "cancelled"):
            yield failure_of(data)


def sent(event: ImageEvent) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"


def partial_of(preview: JobPreview, prefix: str, index: int, created: int) -> PartialImage:
    return PartialImage(
        type=f"{prefix}.partial_image",
        b64_json=preview.data,
        created_at=created,
        output_format=FORMATS[preview.media_type],
        size=f"{preview.width}x{preview.height}",
        partial_image_index=index,
    )


def completed_of(made: GenerateResponse, prefix: str) -> CompletedImage:
    picture = made.images[0]
    return CompletedImage(
        type=f"{prefix}.completed",
        b64_json=picture.data,
        created_at=made.created,
        output_format=FORMATS[picture.media_type],
        size=f"{picture.width}x{picture.height}",
    )


def failure_of(status: JobStatus) -> str:
    """The end of a job that has no picture; clients raise it."""
    error = status.error.model_dump() if status.error else {"message": "the job was cancelled"}
    return f"event: error\ndata: {json.dumps({'type': 'error', 'error': error})}\n\n"

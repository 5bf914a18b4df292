"""Request and response bodies of the OpenAI Images API.

Limits of values are checked later, when a body is translated to a native request.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from service.requests.images import Format

MAX_PARTIAL_IMAGES = 3  # the limit of OpenAI's API
NO_EFFECT = "Accepted; has no effect."
WARNED = "Accepted; has no effect, with a warning in `warnings`."
EXTENSION = "Extension of this service."

SIZE = r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$"
Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]


def require_file(value: object) -> object:
    """Refuse text in a form field for a file, with this service's message instead of the framework's."""
    if isinstance(value, str):
        raise ValueError("must be a file")
    return value


def require_size(value: object) -> object:
    """Refuse a text that is no size, with an example of one."""
    if isinstance(value, str) and not re.fullmatch(SIZE, value):
        raise ValueError("must be auto or WIDTHxHEIGHT, such as 512x512")
    return value


Upload = Annotated[UploadFile, BeforeValidator(require_file)]


class OpenAIRequest(BaseModel):
    """The common fields of all three requests. In forms, numbers are text."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Annotated[
        str | None,
        Field(
            description="A model of GET /v1/models. A name of OpenAI's own models (dall-e-3, gpt-image-1, "
            "...) selects the only model that supports the request. Default: the first model."
        ),
    ] = None
    n: Annotated[int | None, Field(description="Number of images; default 1.")] = None
    size: Annotated[
        str | None,
        Field(
            pattern=SIZE,
            description="WIDTHxHEIGHT, or auto for the model's default. If `model` is an alias or a name of "
            "OpenAI's models, images larger than the model's default size are generated near that size and "
            "enlarged.",
        ),
        BeforeValidator(require_size),
    ] = None
    response_format: Annotated[
        Literal["url", "b64_json"] | None,
        Field(
            description="b64_json: the file in base64. url: a URL of the file, which is valid for a limited "
            "time and needs no API key. Default: base64 for gpt-image models, otherwise both."
        ),
    ] = None
    user: Annotated[str | None, Field(max_length=1000, description=NO_EFFECT)] = None
    seed: Annotated[
        int | None,
        Field(description=f"{EXTENSION} Seed of the first image; missing or -1: a random seed."),
    ] = None
    steps: Annotated[int | None, Field(description=f"{EXTENSION} Number of denoising steps.")] = None
    num_inference_steps: Annotated[int | None, Field(description=f"{EXTENSION} Same as steps.")] = None
    guidance_scale: Annotated[
        float | None, Field(description=f"{EXTENSION} Scale of classifier-free guidance.")
    ] = None
    negative_prompt: Annotated[
        str | None, Field(description=f"{EXTENSION} What the image should not show.")
    ] = None
    sampler: Annotated[str | None, Field(description=f"{EXTENSION} A sampler of GET /models.")] = None


class PromptedRequest(OpenAIRequest):
    """The common fields of requests with a prompt."""

    prompt: str
    stream: Annotated[bool | None, Field(description="Answer with server-sent events.")] = None
    partial_images: Annotated[
        int | None,
        Field(ge=0, le=MAX_PARTIAL_IMAGES, description="Number of previews; requires stream."),
    ] = None
    output_format: Format | None = None
    output_compression: Annotated[
        int | None,
        Field(ge=0, le=100, description="Quality of a JPEG or WebP file in percent."),
    ] = None
    quality: Annotated[Quality | None, Field(description=WARNED)] = None
    background: Annotated[
        Literal["auto", "opaque"] | None, Field(description="Images are always opaque.")
    ] = None
    safety_identifier: Annotated[str | None, Field(max_length=1000, description=NO_EFFECT)] = None
    complexity: None = None
    svg: None = None
    frame_count: None = None
    frame_duration_ms: None = None


class ImageGeneration(PromptedRequest):
    """Text to image."""

    model_config = ConfigDict(strict=True)

    moderation: Annotated[Literal["auto", "low"] | None, Field(description=NO_EFFECT)] = None
    style: Annotated[Literal["vivid", "natural"] | None, Field(description=WARNED)] = None


class UploadForm(BaseModel):
    """The common fields of both forms."""

    strength: Annotated[
        float | None,
        Field(description=f"{EXTENSION} How much of the image to change: the fraction of the steps to run."),
    ] = None


class ImageEdit(UploadForm, PromptedRequest):
    """Inpainting with a mask or a partly transparent image; otherwise image to image."""

    image: Annotated[list[Upload], Field(description="One PNG, JPEG or WebP file.")] = []
    images: Annotated[list[Upload], Field(alias="image[]", description="Another name of image.")] = []
    mask: Annotated[
        Upload | None,
        Field(description="A PNG file of the same size; its fully transparent pixels are repainted."),
    ] = None
    input_fidelity: Annotated[Literal["low", "high"] | None, Field(description=WARNED)] = None
    markup: None = None


class ImageVariation(UploadForm, OpenAIRequest):
    """Image to image without a prompt."""

    image: Annotated[Upload, Field(description="A PNG, JPEG or WebP file.")]


class Image(BaseModel):
    b64_json: Annotated[str | None, Field(description="The file in base64.")] = None
    url: Annotated[str | None, Field(description="URL of the file, valid for a limited time.")] = None


class ImagesResponse(BaseModel):
    created: Annotated[int, Field(description="Seconds since 1970.")]
    data: list[Image]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str
    warnings: Annotated[
        list[str], Field(description=f"{EXTENSION} For example the fields that had no effect.")
    ] = []


class InputTokens(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Always 0: clients expect the field at the end of a stream, but this service counts no tokens."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    total_tokens: int = 0


class ImageEvent(BaseModel):
    """The common fields of both events of a stream."""

    type: str
    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: Format
    quality: Literal["auto"] = "auto"
    size: str


class PartialImage(ImageEvent):
    partial_image_index: int


class CompletedImage(ImageEvent):
    usage: Usage = Usage()


class OpenAIModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="When this service started, in seconds since 1970.")]
    owned_by: str = "local"


class OpenAIModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]

"""Wire bodies of the OpenAI Images API. What only its own models can do takes the values that change nothing.

The limits of what is handed on are those of POST /generate.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

from service.requests.images import Format

MOST_PARTIAL = 3  # pictures on the way; what the API allows


class ImageRequest(BaseModel):
    """What all three have in common. Numbers may be text, as forms have them."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Annotated[str | None, Field(description="of GET /v1/models; default: the first")] = None
    n: int | None = None
    size: Annotated[
        str | None,
        Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$", description="WIDTHxHEIGHT or auto"),
    ] = None
    response_format: Annotated[
        Literal["b64_json"] | None, Field(description="no files are kept that a URL could name")
    ] = None
    user: Annotated[str | None, Field(max_length=1000, description="changes nothing")] = None
    seed: Annotated[int | None, Field(description="ours: of picture 0")] = None
    steps: Annotated[int | None, Field(description="ours")] = None
    num_inference_steps: Annotated[int | None, Field(description="ours: the same as steps")] = None
    guidance_scale: Annotated[float | None, Field(description="ours")] = None
    negative_prompt: Annotated[str | None, Field(description="ours")] = None
    sampler: Annotated[str | None, Field(description="ours")] = None


class PromptedRequest(ImageRequest):
    """What those with a prompt have in common."""

    prompt: str
    stream: bool | None = None
    partial_images: Annotated[
        int | None, Field(ge=0, le=MOST_PARTIAL, description="pictures on the way, of a stream")
    ] = None
    output_format: Format | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    safety_identifier: Annotated[str | None, Field(max_length=1000, description="changes nothing")] = None
    output_compression: None = None
    complexity: None = None
    svg: None = None
    frame_count: None = None
    frame_duration_ms: None = None


class ImageGeneration(PromptedRequest):
    """A picture of a prompt."""

    model_config = ConfigDict(strict=True)

    moderation: Annotated[
        Literal["auto", "low"] | None, Field(description="changes nothing: nothing is moderated")
    ] = None
    style: None = None


class PictureUpload(BaseModel):
    """What the forms have in common."""

    strength: Annotated[
        float | None, Field(description="ours: the share of the steps that a run from a picture takes")
    ] = None


class ImageEdit(PictureUpload, PromptedRequest):
    """A picture from a picture. With a mask, only what is fully transparent in the mask changes."""

    image: Annotated[list[UploadFile], Field(description="the picture: a PNG, JPEG or WebP file")] = []
    images: Annotated[
        list[UploadFile], Field(alias="image[]", description="another name of image, for several")
    ] = []
    mask: UploadFile | None = None
    input_fidelity: Literal["low"] | None = None
    markup: None = None


class ImageVariation(PictureUpload, ImageRequest):
    """Another picture like a picture."""

    image: Annotated[UploadFile, Field(description="a PNG, JPEG or WebP file")]


class Image(BaseModel):
    b64_json: str


class ImagesResponse(BaseModel):
    created: Annotated[int, Field(description="seconds since 1970")]
    data: list[Image]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str


class InputTokens(BaseModel):
    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Clients expect it at a stream's end. Nothing is charged, so no tokens are counted."""

    input_tokens: int = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: int = 0
    total_tokens: int = 0


class ImageEvent(BaseModel):
    """What both events of a stream have in common."""

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
    created: Annotated[int, Field(description="when this service started; seconds since 1970")]
    owned_by: str = "local"


class OpenAIModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]

"""Wire bodies. What is not named here is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from service.images import Format
from service.job import MAX_SEED

MAX_SIDE = 8192
MAX_N = 1024  # the operator's own limit comes on top
MAX_TEXT = 4000


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


class GenerateRequest(BaseModel):
    """What to make. What is left out comes from the model's defaults, which GET /models tells."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(not_blank)]
    negative_prompt: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    model: Annotated[str | None, Field(max_length=200, description="default: the first model loaded")] = None
    width: Annotated[int | None, Field(ge=1, le=MAX_SIDE, description="pixels")] = None
    height: Annotated[int | None, Field(ge=1, le=MAX_SIDE, description="pixels")] = None
    steps: Annotated[int | None, Field(ge=1, le=1000)] = None
    guidance_scale: Annotated[float | None, Field(ge=0, le=50, description="1: none")] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="of image 0; drawn if missing")] = None
    n: Annotated[int, Field(ge=1, le=MAX_N, description="pictures")] = 1
    sampler: Annotated[str | None, Field(max_length=50)] = None
    eta: Annotated[float | None, Field(ge=0, le=1, description="0: DDIM; 1: DDPM")] = None
    output_format: Format | None = None
    priority: Annotated[int, Field(ge=0, le=9, description="larger runs sooner")] = 0
    timeout: Annotated[float | None, Field(gt=0, le=86_400, description="seconds until a 504")] = None


class Picture(BaseModel):
    data: Annotated[str, Field(description="the file, in base64")]
    media_type: str
    seed: int
    width: int
    height: int


class Timings(BaseModel):
    """Seconds."""

    queue: float
    denoise: float
    decode: float
    total: float


class GenerateResponse(BaseModel):
    id: str
    model: str
    created: Annotated[int, Field(description="seconds since 1970")]
    images: list[Picture]
    timings: Timings
    warnings: list[str]


class ModelDefaults(BaseModel):
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: str
    eta: float


class ModelLimits(BaseModel):
    size_multiple: Annotated[int, Field(description="width and height must be multiples of it")]
    max_pixels: Annotated[int, Field(description="width * height")]
    max_steps: int
    max_n: int
    max_work: Annotated[int, Field(description="n * steps * width * height")]


class Model(BaseModel):
    name: str
    tasks: list[str]
    defaults: ModelDefaults
    limits: ModelLimits
    samplers: list[str]


class ModelList(BaseModel):
    models: list[Model]


class Health(BaseModel):
    status: Literal["ok", "loading", "draining", "failed"]
    models: list[str]
    jobs: Annotated[int, Field(description="accepted and not answered")]
    capacity: int


class ErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None
    code: str
    request_id: str


class ErrorBody(BaseModel):
    error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error model for each status, as FastAPI's `responses`."""
    return {status: {"model": ErrorBody} for status in statuses}

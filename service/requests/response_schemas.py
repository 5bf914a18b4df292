"""Images and errors, as the native API returns them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None
    code: str
    request_id: str


class ImageResult(BaseModel):
    data: Annotated[str, Field(description="The file in base64")]
    media_type: str
    seed: int
    width: int
    height: int


class Timings(BaseModel):
    """Durations of the parts of a request, in seconds."""

    queue: float
    denoise: float
    decode: float
    total: float


class GenerateResponse(BaseModel):
    id: str
    model: str
    created: Annotated[int, Field(description="Seconds since 1970")]
    images: list[ImageResult]
    timings: Timings
    warnings: list[str]


class ErrorBody(BaseModel):
    error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error body for each status, as FastAPI's `responses`."""
    return {status: {"model": ErrorBody} for status in statuses}

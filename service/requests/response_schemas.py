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


# Header fields of a 429. RateLimit* are sent where a limit of the key counts the request, with any status.
LIMIT_HEADERS: dict[str, Any] = {
    "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds until a repetition may succeed"},
    "RateLimit-Policy": {
        "schema": {"type": "string"},
        "description": "The limits of the key that count this request (IETF draft)",
        "example": '"requests";q=60;w=60, "images";q=500;qu="images";w=3600',
    },
    "RateLimit": {
        "schema": {"type": "string"},
        "description": "What is left of each, and the seconds until it is more (IETF draft)",
        "example": '"requests";r=59;t=60, "images";r=0;t=1800',
    },
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error body for each status, and the header fields of a 429, as FastAPI's `responses`."""
    return {
        status: {"model": ErrorBody} | ({"headers": LIMIT_HEADERS} if status == 429 else {})
        for status in statuses
    }

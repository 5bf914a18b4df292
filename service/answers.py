"""From a finished job to what the client accepts: JSON around base64, or the picture itself."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from service import images
from service.errors import NotAcceptable
from service.images import MEDIA_TYPES, Format
from service.job import Done, Job
from service.schemas import GenerateRequest, GenerateResponse, Picture, Timings

JSON_TYPES = ("application/json", "application/*", "*/*")
BARE = {media_type: kind for kind, media_type in MEDIA_TYPES.items()}
HIDDEN = ("id", "priority", "preview_every", "image", "mask")  # of a job; no parameters of the picture


def bare_format(accept: str | None, body: GenerateRequest) -> Format | None:
    """The format of a picture sent by itself, or None for JSON. Raises NotAcceptable."""
    wanted = preferred(accept or "*/*")
    if wanted is None:
        raise NotAcceptable("expected application/json, image/png, image/jpeg or image/webp", param="Accept")
    if wanted in JSON_TYPES:
        return None
    kind = body.output_format or "png" if wanted == "image/*" else BARE[wanted]
    if body.n != 1:
        raise NotAcceptable("n must be 1 for a picture without JSON around it", param="n")
    if body.output_format not in (None, kind):
        raise NotAcceptable("output_format must agree with the Accept header", param="output_format")
    return kind


def preferred(accept: str) -> str | None:
    """The type with the largest q of those that we can send, the first of equals; None if none."""
    offers = [quality(part) for part in accept.split(",")]
    known = [(q, kind) for q, kind in offers if q > 0 and kind in (*JSON_TYPES, *BARE, "image/*")]
    return max(known, key=lambda offer: offer[0])[1] if known else None


def quality(part: str) -> tuple[float, str]:
    """(q, media type) of one part of an Accept header; a q that is no number counts as 0."""
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    text = next((p[2:] for p in parameters if p.startswith("q=")), "1")
    try:
        return float(text), kind
    except ValueError:
        return 0.0, kind


async def files(job: Job, done: Done, kind: Format) -> list[bytes]:
    """The encoded pictures; the work is done off the event loop."""
    return [
        await asyncio.to_thread(images.encode, pixels, job.width, job.height, kind, parameters(job, index))
        for index, pixels in enumerate(done.pictures)
    ]


def parameters(job: Job, index: int) -> dict[str, Any]:
    """A request that makes image `index` again."""
    return {key: value for key, value in asdict(job).items() if key not in HIDDEN} | {
        "seed": job.seed + index,
        "n": 1,
    }


def timings(done: Done, total: float) -> dict[str, float]:
    """Seconds of each part; `total` is the API process's own measure."""
    parts = {"queue": done.queue, "denoise": done.denoise, "decode": done.decode, "total": total}
    return {part: round(seconds, 6) for part, seconds in parts.items()}


async def as_json(
    job: Job, done: Done, files: list[bytes], kind: Format, timings: Mapping[str, float]
) -> GenerateResponse:
    """The pictures in base64, with what there is to say about them."""
    pictures = [
        Picture(
            data=(await asyncio.to_thread(base64.b64encode, file)).decode(),
            media_type=MEDIA_TYPES[kind],
            seed=job.seed + index,
            width=job.width,
            height=job.height,
        )
        for index, file in enumerate(files)
    ]
    return GenerateResponse(
        id=job.id,
        model=job.model,
        created=int(time.time()),
        images=pictures,
        timings=Timings(**timings),
        warnings=list(done.warnings),
    )

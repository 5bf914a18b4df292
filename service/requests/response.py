"""From a finished job to what the client accepts: JSON around base64, or the picture itself."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image
from starlette.responses import Response

from models.tiles import merge
from service.engine.events import Done, Previewed
from service.errors import NotAcceptable
from service.requests import images
from service.requests.images import MEDIA_TYPES, Format
from service.requests.resolve import Order
from service.requests.schemas import GenerateResponse, JobPreview, Picture, PictureRequest, Timings
from service.worker.progress import Progress
from service.worker.supervisor import Supervisor

JSON_TYPES = ("application/json", "application/*", "*/*")
BARE = {media_type: kind for kind, media_type in MEDIA_TYPES.items()}
HIDDEN = (
    "id",
    "priority",
    "preview_every",
    "preview_decoded",
    "image",
    "mask",
    "regions",
    "scale",
    "noise_level",
    "boxes",
    "loras",
)  # of a job; no parameters of the picture


def bare_format(accept: str | None, body: PictureRequest) -> Format | None:
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


@dataclass(frozen=True)
class Answer:
    """The files of a finished order, and what there is to say about them; timings in seconds."""

    order: Order
    files: tuple[bytes, ...]
    warnings: tuple[str, ...]
    timings: Mapping[str, float]
    created: int  # seconds since 1970

    def as_picture(self) -> Response:
        """The one picture by itself."""
        headers = {"X-Seed": str(self.order.job.seed)}
        return Response(self.files[0], media_type=MEDIA_TYPES[self.order.format], headers=headers)

    async def as_json(self) -> GenerateResponse:
        """The pictures in base64."""
        job, texts = self.order.job, await asyncio.to_thread(lambda: list(map(base64.b64encode, self.files)))
        size = {"width": self.order.width, "height": self.order.height}
        kind = MEDIA_TYPES[self.order.format]
        return GenerateResponse(
            id=job.id,
            model=job.model,
            created=self.created,
            images=[
                Picture(data=text.decode(), media_type=kind, seed=job.seed + index, **size)
                for index, text in enumerate(texts)
            ],
            timings=Timings(**self.timings),
            warnings=list(self.warnings),
        )


async def make(
    order: Order, supervisor: Supervisor, begin: float, progress: Progress | None = None
) -> Answer:
    """Run an order's job and encode its pictures, off the event loop; begin: when its request came."""
    done = await supervisor.run(order.job, progress)
    files = tuple(
        [
            await asyncio.to_thread(file_of, order, index, parts)
            for index, parts in enumerate(parts_of(order, done))
        ]
    )
    seconds = timings(done, time.monotonic() - begin)
    supervisor.metrics.answered(order.job.n, seconds)
    warnings = order.warnings + done.warnings
    return Answer(order.without_pictures(), files, warnings, seconds, int(time.time()))


def parts_of(order: Order, done: Done) -> list[tuple[bytes, ...]]:
    """The picture of each image by itself, or its tiles."""
    count = len(done.images) // order.job.n
    return [done.images[index * count :][:count] for index in range(order.job.n)]


def file_of(order: Order, index: int, parts: Sequence[bytes]) -> bytes:
    """The file of image `index`."""
    shown = enlarged(order, parts) if order.tiles else pixels_of(order, parts[0])
    return images.encode(shown, order.width, order.height, order.format, parameters(order, index))


def pixels_of(order: Order, pixels: bytes) -> bytes:
    """The client's part of a job's canvas."""
    canvas = np.frombuffer(pixels, np.uint8).reshape(order.job.height, order.job.width, 3)
    return canvas[: order.height, : order.width].tobytes()


def enlarged(order: Order, parts: Sequence[bytes]) -> bytes:
    """The client's part of a canvas in tiles, at the scale that was asked for."""
    scale, (rows, columns) = order.job.scale, order.tiles.size
    tiles = (np.frombuffer(part, np.uint8).reshape(scale * rows, scale * columns, 3) for part in parts)
    canvas = merge(tiles, order.tiles, scale).round().astype(np.uint8)
    height, width = (side // order.scale * scale for side in (order.height, order.width))
    picture = Image.fromarray(canvas[:height, :width])
    if order.scale != scale:
        picture = picture.resize((order.width, order.height), Image.Resampling.LANCZOS)
    return picture.tobytes()


def preview_of(order: Order, preview: Previewed) -> JobPreview:
    """A preview as a small file, without what the canvas has around the client's picture."""
    job = order.job
    whole = np.frombuffer(preview.pixels, np.uint8).reshape(preview.height, preview.width, 3)
    width = max(1, round(preview.width * order.width / job.width))
    height = max(1, round(preview.height * order.height / job.height))
    kind = order.preview_format
    file = images.encode(whole[:height, :width].tobytes(), width, height, kind, {})
    return JobPreview(
        index=preview.index,
        step=preview.step,
        data=base64.b64encode(file).decode(),
        media_type=MEDIA_TYPES[kind],
        width=width,
        height=height,
    )


def parameters(order: Order, index: int) -> dict[str, Any]:
    """A request that makes image `index` again, apart from pictures that it starts from."""
    job = order.job
    hidden = HIDDEN if job.image and not job.scale else (*HIDDEN, "strength")
    own = {"width": order.width, "height": order.height, "seed": job.seed + index, "n": 1}
    if job.scale:
        hidden = (*hidden, "width", "height", *(() if job.negative_prompt else ("negative_prompt",)))
        own = {"scale": order.scale, "noise_level": job.noise_level, "seed": job.seed + index, "n": 1}
    if order.boxes:
        own["boxes"] = [box.model_dump() for box in order.boxes]
    values = {key: value for key, value in asdict(job).items() if key not in hidden}
    if not values["prompt"] or job.class_label is not None:  # a class that has a name is its prompt too
        del values["prompt"]
    unsaid = {"class_label": None, "spacing": None, "long_prompts": "cut", "prompt_weights": False}
    for name, value in unsaid.items():
        if values[name] == value:
            del values[name]
    if job.loras:
        own["loras"] = dict(job.loras)
    return values | own


def timings(done: Done, total: float) -> dict[str, float]:
    """Seconds of each part; `total` is the API process's own measure."""
    parts = {"queue": done.queue, "denoise": done.denoise, "decode": done.decode, "total": total}
    return {part: round(seconds, 6) for part, seconds in parts.items()}

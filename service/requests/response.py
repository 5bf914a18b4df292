"""Responses from finished jobs, in a form that the client accepts: JSON with base64, or an image file."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image
from starlette.responses import Response

from models.tiles import merge
from service.engine.events import Done, Previewed
from service.errors import NotAcceptable
from service.requests import images
from service.requests.images import FORMAT_OF_MEDIA_TYPE, MEDIA_TYPES, Format, Pixels
from service.requests.job_schemas import JobPreview
from service.requests.metadata import Metadata
from service.requests.resolve import OutputFormat
from service.requests.resolved_request import ResolvedRequest
from service.requests.response_schemas import GenerateResponse, ImageResult, Timings
from service.requests.signing import Signer

JSON_TYPES = ("application/json", "application/*", "*/*")


def negotiate(accept: str | None, output_format: Format | None = None, n: int = 1) -> OutputFormat | None:
    """The format of a response that is an image file; None for a JSON response. Raises NotAcceptable.

    output_format, n: of the request, which has no such field if they are left out.
    """
    wanted = preferred_type(accept or "*/*")
    if wanted is None:
        expected = "application/json, image/png, image/jpeg or image/webp"
        raise NotAcceptable(f"Accept must allow {expected}", param="Accept")
    if wanted in JSON_TYPES:
        return None
    kind = output_format or "png" if wanted == "image/*" else FORMAT_OF_MEDIA_TYPE[wanted]
    if n != 1:
        raise NotAcceptable("n must be 1 for an image without JSON around it", param="n")
    if output_format not in (None, kind):
        raise NotAcceptable("output_format must agree with the Accept header", param="output_format")
    return OutputFormat(kind, "Accept")


def preferred_type(accept: str) -> str | None:
    """The accepted media type with the largest q that this service can send, or None."""
    offers = [quality(part) for part in accept.split(",")]
    known = [
        (q, kind) for q, kind in offers if q > 0 and kind in (*JSON_TYPES, *FORMAT_OF_MEDIA_TYPE, "image/*")
    ]
    return max(known, key=lambda offer: offer[0])[1] if known else None


def quality(part: str) -> tuple[float, str]:
    """(q, media type) of one part of an Accept header; a malformed q counts as 0."""
    kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
    text = next((p[2:] for p in parameters if p.startswith("q=")), "1")
    try:
        return float(text), kind
    except ValueError:
        return 0.0, kind


@dataclass(frozen=True, eq=False)
class Result:
    """The finished images of a request, as pixels."""

    resolved: ResolvedRequest
    done: Done

    def pixels(self, index: int) -> Pixels:
        """Image `index`, (height, width, 3): the client's part of the canvas. Slow for upscaled images."""
        resolved, count = self.resolved, len(self.done.images) // self.resolved.parameters.n
        parts = self.done.images[index * count :][:count]
        if resolved.tiles:
            return self._merged(parts)
        canvas_width, canvas_height = resolved.final_canvas
        canvas = np.frombuffer(parts[0], np.uint8).reshape(canvas_height, canvas_width, 3)
        (width, height), paste = resolved.used_size, resolved.inputs.paste
        return paste.into(canvas[:height, :width]) if paste else canvas[:height, :width]

    def _merged(self, parts: tuple[bytes, ...]) -> Pixels:
        """The client's part of a canvas of tiles, at the requested scale."""
        resolved, tiles, model_scale = self.resolved, self.resolved.tiles, self.resolved.model_scale
        assert tiles is not None
        shape = model_scale * tiles.size[0], model_scale * tiles.size[1], 3
        arrays = (np.frombuffer(part, np.uint8).reshape(shape) for part in parts)
        canvas = merge(arrays, tiles, model_scale).round().astype(np.uint8)
        scale = resolved.parameters.scale or model_scale
        height, width = (side // scale * model_scale for side in (resolved.height, resolved.width))
        image = Image.fromarray(canvas[:height, :width])
        if scale != model_scale:
            image = image.resize((resolved.width, resolved.height), Image.Resampling.LANCZOS)
        return np.asarray(image)


def encode_image(result: Result, index: int) -> bytes:
    """The file of image `index`, with the parameters to generate it again."""
    return images.encode(result.pixels(index), result.resolved.format, metadata_of(result, index))


def signing(encode: Callable[[Result, int], bytes], signer: Signer | None) -> Callable[[Result, int], bytes]:
    """`encode`, which makes a file, with a signature added to the file; itself without a signer."""

    def encode_and_sign(result: Result, index: int) -> bytes:
        file, source = encode(result, index), result.resolved.digital_source
        return signer.sign(file, result.resolved.format, source) if signer and source else file

    return encode_and_sign if signer else encode


def metadata_of(result: Result, index: int) -> Metadata:
    """The parameters of image `index` as JSON, and its provenance."""
    parameters = json.dumps(result.resolved.parameters.of_image(index))
    return Metadata(parameters, result.resolved.digital_source)


@dataclass(frozen=True)
class Answer:
    """The files of a finished request. timings: seconds; created: seconds since 1970."""

    resolved: ResolvedRequest
    files: tuple[bytes, ...]
    warnings: tuple[str, ...]
    timings: Mapping[str, float]
    created: int

    def as_image(self) -> Response:
        """The response of a request for one image file."""
        headers = {"X-Seed": str(self.resolved.parameters.seed)}
        return Response(self.files[0], media_type=MEDIA_TYPES[self.resolved.format], headers=headers)

    async def as_json(self) -> GenerateResponse:
        """The response with the images in base64."""
        texts = await asyncio.to_thread(lambda: list(map(base64.b64encode, self.files)))
        resolved = self.resolved
        return GenerateResponse(
            id=resolved.id,
            model=resolved.parameters.model,
            created=self.created,
            images=[
                ImageResult(
                    data=text.decode(),
                    media_type=MEDIA_TYPES[resolved.format],
                    seed=resolved.parameters.seed_of(index),
                    width=resolved.width,
                    height=resolved.height,
                )
                for index, text in enumerate(texts)
            ],
            timings=Timings(**self.timings),
            warnings=list(self.warnings),
        )


def timings_of(done: Done, total: float) -> dict[str, float]:
    """Seconds of each part; `total` is measured by the API process."""
    parts = {"queue": done.queue, "denoise": done.denoise, "decode": done.decode, "total": total}
    return {part: round(seconds, 6) for part, seconds in parts.items()}


def to_job_preview(resolved: ResolvedRequest, preview: Previewed) -> JobPreview:
    """A preview as an image file of the client's part of the canvas."""
    whole = np.frombuffer(preview.pixels, np.uint8).reshape(preview.height, preview.width, 3)
    width, height = (
        max(1, round(side * used / canvas))
        for side, used, canvas in zip(
            (preview.width, preview.height),
            resolved.used_size,
            resolved.final_canvas,
            strict=True,
        )
    )
    kind = resolved.previews.format
    file = images.encode(whole[:height, :width], kind)
    return JobPreview(
        index=preview.index,
        step=preview.step,
        data=base64.b64encode(file).decode(),
        media_type=MEDIA_TYPES[kind],
        width=width,
        height=height,
    )

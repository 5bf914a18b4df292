"""Streams of the OpenAI Images API: a job's events as server-sent events."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Literal

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.api.jobs import SSE_HEADERS
from service.api.openai.schemas import CompletedImage, ImageEvent, PartialImage
from service.api.openai.translate import size_of
from service.requests.images import FORMAT_OF_MEDIA_TYPE
from service.requests.job_record import Record
from service.requests.job_schemas import JobPreview, JobStatus
from service.requests.response import Answer

Prefix = Literal["image_generation", "image_edit"]


class CancelOnDisconnect(StreamingResponse):
    """The events of a job, which is cancelled when the client leaves."""

    def __init__(self, record: Record, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=SSE_HEADERS)
        self.record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.record.work.cancel()


async def events(record: Record, prefix: Prefix, partial_images: int) -> AsyncIterator[str]:
    """The text of a job's event stream, up to the image or the error that ends it."""
    partial_index = 0
    async for event in record.events():
        if event is None:
            yield ": keep-alive\n\n"
            continue
        _, name, data = event
        if isinstance(data, JobPreview):
            if partial_index < partial_images:
                yield to_text(to_partial_image(data, prefix, partial_index, int(record.created)))
                partial_index += 1
        elif name == "done":
            yield to_text(to_completed_image(record.work.result(), prefix))
        elif name in ("failed", "cancelled"):
            yield to_error_event(data)


def to_text(event: ImageEvent) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"


def to_partial_image(preview: JobPreview, prefix: Prefix, index: int, created: int) -> PartialImage:
    return PartialImage(
        type=f"{prefix}.partial_image",
        b64_json=preview.data,
        created_at=created,
        output_format=FORMAT_OF_MEDIA_TYPE[preview.media_type],
        size=f"{preview.width}x{preview.height}",
        partial_image_index=index,
    )


def to_completed_image(answer: Answer, prefix: Prefix) -> CompletedImage:
    return CompletedImage(
        type=f"{prefix}.completed",
        b64_json=base64.b64encode(answer.files[0]).decode(),
        created_at=answer.created,
        output_format=answer.resolved.format,
        size="{}x{}".format(*size_of(answer.files[0])),
    )


def to_error_event(status: JobStatus) -> str:
    """The end of a job without an image; clients raise it as an exception."""
    error = status.error.model_dump() if status.error else {"message": "the job was cancelled"}
    return f"event: error\ndata: {json.dumps({'type': 'error', 'error': error})}\n\n"

"""GET /activity: UNet calls as they happen."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from service.engine.events import Stepped
from service.errors import QueueFull
from service.requests.schemas import error_responses
from service.worker.supervisor import Supervisor

router = APIRouter(tags=["operations"])

MAX_WATCHERS = 64
KEEP_ALIVE_SECONDS = 15.0
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # no proxy may hold events back
EVENTS: dict[str, Any] = {
    "description": "Server-sent events `call`, one for each UNet call; the data is a UNetCall",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


class CallJob(BaseModel):
    tag: Annotated[str, Field(description="CRC-32 of the job's id, 8 hexadecimal digits")]
    rows: Annotated[int, Field(description="rows of this job in the call")]


class UNetCall(BaseModel):
    """One UNet call."""

    rows: Annotated[int, Field(description="rows that belong to images")]
    padded: Annotated[int, Field(description="rows with padding")]
    images: int
    seconds: float
    running: Annotated[int, Field(description="jobs that have started")]
    waiting: Annotated[int, Field(description="jobs that have not started")]
    jobs: list[CallJob]


@router.get(
    "/activity",
    response_class=StreamingResponse,
    responses={200: EVENTS, **error_responses(429, 500)},
    summary="Watch UNet calls",
)
async def watch_activity(request: Request) -> StreamingResponse:
    """Which jobs share each UNet call, until the client leaves. A slow client misses calls.

    Jobs are named by a tag: their ids, with which results can be fetched, are not disclosed.
    """
    supervisor: Supervisor = request.app.state.supervisor
    if supervisor.calls.watchers >= MAX_WATCHERS:
        raise QueueFull("too many clients watch the activity already")
    return StreamingResponse(stream(supervisor), media_type="text/event-stream", headers=HEADERS)


async def stream(supervisor: Supervisor) -> AsyncIterator[str]:
    """Each call as text/event-stream; comments keep a silent connection open."""
    yield ": connected\n\n"
    async for call in supervisor.calls.watch(KEEP_ALIVE_SECONDS):
        yield (
            ": keep-alive\n\n"
            if call is None
            else f"event: call\ndata: {describe(call).model_dump_json()}\n\n"
        )


def describe(call: Stepped) -> UNetCall:
    jobs = [CallJob(tag=f"{zlib.crc32(part.job.encode()):08x}", rows=part.rows) for part in call.jobs]
    return UNetCall(
        rows=call.rows,
        padded=call.padded,
        images=call.images,
        seconds=round(call.seconds, 4),
        running=call.running,
        waiting=call.waiting,
        jobs=jobs,
    )

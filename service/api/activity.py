"""GET /activity: the most recent UNet calls, and the jobs in each."""

from __future__ import annotations

import zlib
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from service.requests.response_schemas import error_responses
from service.worker.backend import Backend
from service.worker.call_log import MAX_CALLS, RecordedCall

router = APIRouter(tags=["operations"])


class CallJob(BaseModel):
    tag: Annotated[str, Field(description="CRC-32 of the job's id, 8 hexadecimal digits")]
    rows: Annotated[int, Field(description="rows of this job in the call")]


class UNetCall(BaseModel):
    """One UNet call."""

    replica: Annotated[int, Field(description="number of the replica that made it")]
    rows: Annotated[int, Field(description="rows that belong to images")]
    padded: Annotated[int, Field(description="rows with padding")]
    images: int
    seconds: float
    jobs: list[CallJob]


class Activity(BaseModel):
    last: Annotated[int, Field(description="number of the newest call; `after` of the next request")]
    calls: Annotated[list[UNetCall], Field(description=f"the oldest first, at most {MAX_CALLS}")]


@router.get("/activity", responses=error_responses(422, 500), summary="List the most recent UNet calls")
async def read_activity(
    request: Request, after: Annotated[int, Query(ge=0, description="only calls after this one")] = 0
) -> Activity:
    """Jobs are named by a tag: their ids, with which results can be fetched, are not disclosed."""
    supervisor: Backend = request.app.state.supervisor
    return Activity(last=supervisor.calls.count, calls=list(map(describe, supervisor.calls.after(after))))


def describe(recorded: RecordedCall) -> UNetCall:
    call = recorded.call
    jobs = [CallJob(tag=f"{zlib.crc32(part.job.encode()):08x}", rows=part.rows) for part in call.jobs]
    return UNetCall(
        replica=recorded.replica,
        rows=call.rows,
        padded=call.padded,
        images=call.images,
        seconds=round(call.seconds, 4),
        jobs=jobs,
    )

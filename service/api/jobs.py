"""The jobs API: POST /jobs, then GET and DELETE /jobs/{id} and its events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Request, Response
from fastapi.responses import StreamingResponse

from service.api.auth import credentials_in, digest
from service.api.routing import JSONRoute
from service.requests.background import Jobs, Record
from service.requests.schemas import JobRequest, JobStatus, error_responses

router = APIRouter(tags=["jobs"], route_class=JSONRoute)

ACCEPTED: dict[str, Any] = {
    "description": "It has a place in the queue",
    "headers": {"Location": {"schema": {"type": "string"}, "description": "where to ask for it"}},
}
EVENTS: dict[str, Any] = {
    "description": (
        "Server-sent events `queued`, `step`, `preview` and, at the end, `done`, `failed` or `cancelled`; "
        "the data of a `preview` are `index`, `step`, `data` (base64), `media_type`, `width` and `height`, "
        "those of all others the JobStatus of that moment"
    ),
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
LIVE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # or a proxy gathers events until the end


def find(request: Request, job_id: str) -> Record:
    jobs: Jobs = request.app.state.jobs
    return jobs.find(job_id)


@router.post(
    "/jobs",
    status_code=202,
    responses={202: ACCEPTED, **error_responses(400, 404, 408, 413, 415, 422, 429, 500, 503)},
    summary="Ask for pictures without waiting for them",
)
async def create_job(
    body: Annotated[JobRequest, Body()],
    request: Request,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=255,
            description="the same key and body: the same job",
        ),
    ] = None,
) -> JobStatus:
    """Take a place in the queue and answer at once. The job goes on when the client leaves."""
    key = idempotency_key and (idempotency_key, *map(digest, credentials_in(request.scope)))
    jobs: Jobs = request.app.state.jobs
    record = await jobs.submit(body, key, request.state.request_id)
    response.headers["Location"] = f"/jobs/{record.id}"
    return await record.describe()


@router.get("/jobs/{job_id}", responses=error_responses(404, 422, 500), summary="Where a job stands")
async def read_job(job_id: str, request: Request) -> JobStatus:
    """With the pictures once it is done. Jobs that have ended are kept for a while only."""
    return await find(request, job_id).describe()


@router.get(
    "/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: EVENTS, **error_responses(404, 422, 500)},
    summary="Watch a job",
)
async def job_events(job_id: str, request: Request) -> StreamingResponse:
    """The state of now, then what is new, to the end; a slow reader misses steps, never the end."""
    events = stream(find(request, job_id))
    return StreamingResponse(events, media_type="text/event-stream", headers=LIVE)


async def stream(record: Record) -> AsyncIterator[str]:
    """As text/event-stream; a comment now and then keeps a silent connection open."""
    async for event in record.events():
        if event is None:
            yield ": still here\n\n"
        else:
            name, data = event
            yield f"event: {name}\ndata: {data.model_dump_json()}\n\n"


@router.delete("/jobs/{job_id}", responses=error_responses(404, 422, 500), summary="Cancel a job")
async def cancel_job(job_id: str, request: Request) -> JobStatus:
    """Its rows are free within one step. A job that has ended stays as it is."""
    record = find(request, job_id)
    await record.cancel()
    return await record.describe()

"""The jobs API: POST /jobs, GET and DELETE /jobs/{id}, GET /jobs/{id}/events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Request, Response
from fastapi.responses import StreamingResponse

from service.api.auth import caller_of, credentials_in
from service.api.routing import JSONRoute
from service.keys.table import digest
from service.requests.background import JobBoard
from service.requests.job_record import JobView
from service.requests.job_schemas import JobEnd, JobRequest, JobStatus
from service.requests.response_schemas import error_responses

router = APIRouter(tags=["jobs"], route_class=JSONRoute)
# What the service calls, not what it serves.
callbacks = APIRouter(generate_unique_id_function=lambda route: route.name)

ACCEPTED: dict[str, Any] = {
    "description": "The job is in the queue",
    "headers": {"Location": {"schema": {"type": "string"}, "description": "Address of the job"}},
    "links": {
        name: {"operationId": name, "parameters": {"job_id": "$response.body#/id"}}
        for name in ("read_job", "job_events", "cancel_job")
    },
}
RECEIVED: dict[int | str, dict[str, Any]] = {
    204: {"description": "Delivered, as with any 2xx"},
    "4XX": {"description": "Not delivered. Only 408, 425 and 429 lead to another attempt"},
    "5XX": {"description": "Not delivered; there may be another attempt"},
}
EVENTS: dict[str, Any] = {
    "description": (
        "Server-sent events `queued`, `step`, `preview` and, at the end, `done`, `failed` or `cancelled`. "
        "The data of a `preview` are `index`, `step`, `data` (base64), `media_type`, `width` and `height`; "
        "the data of all other events are a JobStatus. After a lost connection, send the last `id` as "
        "Last-Event-ID"
    ),
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # keep proxies from buffering events


@callbacks.post(
    "{$request.body#/webhook}",
    status_code=204,
    responses=RECEIVED,
    summary="The job has ended",
)
async def job_ended(
    body: JobEnd,
    x_signature: Annotated[
        str,
        Header(
            alias="X-Signature",
            description="HMAC-SHA256 of the body in hexadecimal, with the secret of the operator; while the "
            "secret is being replaced, two, separated by a comma",
        ),
    ],
) -> None:
    """Sent once the job is done, failed or cancelled, to its `webhook`. The same end may arrive twice."""


async def find(request: Request, job_id: str) -> JobView:
    """A job of the request's client. Raises NotFound, also for jobs of others."""
    board: JobBoard = request.app.state.job_board
    return await board.find(job_id, caller_of(request).client)


@router.post(
    "/jobs",
    status_code=202,
    responses={202: ACCEPTED, **error_responses(400, 404, 408, 413, 415, 422, 429, 500, 503)},
    summary="Start a job",
    callbacks=callbacks.routes,
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
            description="A repeated key with the same body returns the first job",
        ),
    ] = None,
) -> JobStatus:
    """Queues the job and answers at once. The job continues when the client disconnects."""
    board: JobBoard = request.app.state.job_board
    key = idempotency_key and (idempotency_key, *sender_of(request))
    record = await board.submit(body, key, caller_of(request))
    response.headers["Location"] = f"/jobs/{record.id}"
    return await record.describe()


def sender_of(request: Request) -> tuple[str | bytes, ...]:
    """Whose an idempotency key is; where no key is needed, clients may still send one that a proxy knows."""
    client = caller_of(request).client
    return tuple(map(digest, credentials_in(request.scope))) if client.is_anonymous else (client.id,)


@router.get("/jobs/{job_id}", responses=error_responses(404, 422, 500, 503), summary="Get a job")
async def read_job(job_id: str, request: Request) -> JobStatus:
    """The state of a job, with the images once it is done. An ended job is kept for a limited time."""
    return await (await find(request, job_id)).describe()


@router.get(
    "/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: EVENTS, **error_responses(404, 422, 500, 503)},
    summary="Stream the events of a job",
)
async def job_events(
    job_id: str,
    request: Request,
    last_event_id: Annotated[
        str | None,
        Header(alias="Last-Event-ID", max_length=32, description="`id` of the last event that was received"),
    ] = None,
) -> StreamingResponse:
    """Sends the current state, then every change until the job ends. A slow reader may miss steps, but never
    the last event. The current state is left out if Last-Event-ID is its id.
    """
    seen = int(last_event_id) if last_event_id and last_event_id.isdecimal() else None
    events = stream(await find(request, job_id), seen)
    return StreamingResponse(events, media_type="text/event-stream", headers=SSE_HEADERS)


async def stream(record: JobView, seen: int | None) -> AsyncIterator[str]:
    """A job's events as text/event-stream; comments in between keep a silent connection open."""
    async for event in record.events(seen):
        if event is None:
            yield ": keep-alive\n\n"
        else:
            yield f"id: {event.number}\nevent: {event.name}\ndata: {event.data.model_dump_json()}\n\n"


@router.delete("/jobs/{job_id}", responses=error_responses(404, 422, 500, 503), summary="Cancel a job")
async def cancel_job(job_id: str, request: Request) -> JobStatus:
    """Stops the job within one step. A job that has ended stays as it is."""
    record = await find(request, job_id)
    await record.cancel()
    return await record.describe()

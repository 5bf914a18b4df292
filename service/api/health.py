"""Health and metrics: answered in this process, whatever the device does."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.errors import Unavailable
from service.requests.schemas import Health, error_responses
from service.worker.supervisor import Supervisor

router = APIRouter(tags=["health"])


def status_of(supervisor: Supervisor) -> str:
    """One word for it."""
    if not supervisor.alive:
        return "failed"
    if supervisor.draining:
        return "draining"
    return "ok" if supervisor.ready else "loading"


def describe(supervisor: Supervisor) -> Health:
    return Health(
        status=status_of(supervisor),
        models=list(supervisor.specs),
        jobs=supervisor.slots_in_use,
        capacity=supervisor.settings.queue_size,
    )


@router.get("/health", responses=error_responses(500), summary="How it goes")
async def health(request: Request) -> Health:
    """Always 200 while the process answers; the body says how it goes."""
    return describe(request.app.state.supervisor)


@router.get("/health/live", responses=error_responses(500, 503), summary="Whether to leave it running")
async def health_live(request: Request) -> Health:
    """200 while the loop turns and the worker beats; 503: start the service again."""
    if not request.app.state.supervisor.alive:
        raise Unavailable("the worker is silent")
    return describe(request.app.state.supervisor)


@router.get("/health/ready", responses=error_responses(500, 503), summary="Whether to send requests")
async def health_ready(request: Request) -> Health:
    """200 while a model is loaded and nothing drains."""
    supervisor: Supervisor = request.app.state.supervisor
    if not supervisor.ready:
        raise Unavailable(f"not ready: {status_of(supervisor)}", retry_after=5)
    return describe(supervisor)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **error_responses(500)},
    summary="Prometheus text",
)
async def metrics(request: Request) -> Response:
    """Names ldm_*."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

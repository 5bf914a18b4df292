"""Health and metrics, answered by the API process without the worker."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service.errors import Unavailable
from service.requests.model_schemas import Health, ReplicaHealth
from service.requests.response_schemas import error_responses
from service.worker.backend import Backend

router = APIRouter(tags=["health"])


def status_of(supervisor: Backend) -> str:
    """The state of the service as /health reports it."""
    if not supervisor.alive:
        return "failed"
    if supervisor.draining:
        return "draining"
    return "ok" if supervisor.ready else "loading"


def describe(supervisor: Backend) -> Health:
    return Health(
        status=status_of(supervisor),
        models=list(supervisor.specs),
        jobs=supervisor.slots_in_use,
        capacity=supervisor.settings.queue_size,
        replicas=[
            ReplicaHealth(
                replica=replica.number, device=replica.device, status=replica.status, jobs=replica.jobs
            )
            for replica in supervisor.replica_states
        ],
    )


@router.get("/health", responses=error_responses(500), summary="Health")
async def health(request: Request) -> Health:
    """Report the state of the service. Always 200; the state is in the body."""
    return describe(request.app.state.supervisor)


@router.get("/health/live", responses=error_responses(500, 503), summary="Liveness")
async def health_live(request: Request) -> Health:
    """200 while the service works; 503 if it has failed and must be restarted."""
    if not request.app.state.supervisor.alive:
        raise Unavailable("the worker does not respond")
    return describe(request.app.state.supervisor)


@router.get("/health/ready", responses=error_responses(500, 503), summary="Readiness")
async def health_ready(request: Request) -> Health:
    """200 while the service accepts requests; 503 while it loads a model or shuts down."""
    supervisor: Backend = request.app.state.supervisor
    if not supervisor.ready:
        raise Unavailable(f"not ready: {status_of(supervisor)}", retry_after=5)
    return describe(supervisor)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **error_responses(500)},
    summary="Metrics",
)
async def metrics(request: Request) -> Response:
    """Prometheus metrics, in the text format; their names begin with ldm_."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

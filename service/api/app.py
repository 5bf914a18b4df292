"""create_app(settings): the web application, its error answers and its life."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from service.api import health, jobs, native, openapi
from service.api.a1111 import routes as a1111
from service.api.a1111.translate import Desk
from service.api.auth import keys_of, require_key
from service.api.middleware import BodyLimit, RequestContext
from service.api.openai import routes as openai
from service.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    Unauthorized,
    UnreadableBody,
    code_of,
    status_of,
    to_body,
)
from service.metrics import Metrics
from service.requests.background import Jobs
from service.requests.schemas import error_responses
from service.requests.validation_errors import explain
from service.settings import Settings
from service.worker.supervisor import Supervisor

# The framework's own errors, by status.
FRAMEWORK = {401: Unauthorized, 404: NotFound, 405: MethodNotAllowed, 400: UnreadableBody}

# Who may ask: those who have a key, where there are keys; and everybody, of what says nothing about anyone's
# requests. The description of the API and its page are public too. /metrics holds counts alone, and
# Prometheus often asks without a key.
KEYED = (native.router, jobs.router, openai.router, a1111.router)
PUBLIC = (health.router,)


def create_app(settings: Settings) -> FastAPI:
    """The application; its lifespan holds the worker. Raises SettingError for keys that cannot be read."""
    keys = keys_of(settings)
    metrics = Metrics()
    supervisor = Supervisor(settings, metrics)
    metrics.queue_size.set(settings.queue_size)
    metrics.ready.set_function(lambda: supervisor.ready)
    metrics.jobs_running.set_function(lambda: supervisor.running)
    metrics.jobs_waiting.set_function(lambda: supervisor.slots_in_use - supervisor.running)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with supervisor.supervise():
            yield

    app = FastAPI(
        title="Latent diffusion",
        lifespan=lifespan,
        generate_unique_id_function=operation_id,
        redirect_slashes=False,  # to an address of the Host header's making
    )
    app.state.settings, app.state.metrics, app.state.supervisor = settings, metrics, supervisor
    app.state.jobs, app.state.keys = Jobs(supervisor), keys
    app.state.desk, app.state.started = Desk(app.state.jobs), int(time.time())
    app.add_middleware(
        BodyLimit,
        limit=settings.max_body_bytes,
        room=settings.max_bodies_bytes,
        metrics=metrics,
        admits=keys.admits,
    )
    # Added last: outermost.
    app.add_middleware(RequestContext, metrics=metrics, leaving=lambda: supervisor.draining)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_framework_error)
    for router in KEYED:
        app.include_router(router, dependencies=[Depends(require_key)], responses=error_responses(401))
    for router in PUBLIC:
        app.include_router(router)
    openapi.install(app)
    return app


def operation_id(route: APIRoute) -> str:
    return route.name


def respond(request: Request, error: ServiceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The error's answer, counted."""
    if request.method == "POST":
        request.app.state.metrics.rejected.labels(code_of(error)).inc()
    request.state.error_code = code_of(error)
    headers = dict(headers or {})
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(to_body(error, request.state.request_id), status_of(error), headers)


async def on_service_error(request: Request, error: ServiceError) -> JSONResponse:
    """Ours."""
    return respond(request, error)


async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Pydantic's."""
    return respond(request, explain(error.errors(), request.headers.get("content-type", "")))


async def on_framework_error(request: Request, error: HTTPException) -> JSONResponse:
    """The framework's: unknown addresses and methods, bodies that are no JSON."""
    kind = FRAMEWORK.get(error.status_code, InvalidRequest if error.status_code < 500 else ServiceError)
    return respond(request, kind(), error.headers)  # a 405 says what is allowed

"""create_app(settings): the web application, its error answers and its life."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from service.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    ServiceError,
    UnreadableBody,
    code_of,
    status_of,
    to_body,
)
from service.intake import explain
from service.jobs import Jobs
from service.metrics import Metrics
from service.middleware import BodyLimit, RequestContext
from service.routes import health, jobs, native
from service.settings import Settings
from service.supervisor import Supervisor

log = logging.getLogger(__name__)

# The framework's own errors, by status.
FRAMEWORK = {404: NotFound, 405: MethodNotAllowed, 400: UnreadableBody}


def create_app(settings: Settings) -> FastAPI:
    """The application; its lifespan holds the worker."""
    metrics = Metrics()
    supervisor = Supervisor(settings, metrics)
    metrics.jobs_running.set_function(lambda: supervisor.running)
    metrics.jobs_waiting.set_function(lambda: supervisor.places - supervisor.running)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with supervisor.supervise():
            yield

    app = FastAPI(title="Latent diffusion", lifespan=lifespan, generate_unique_id_function=operation_id)
    app.state.settings, app.state.metrics, app.state.supervisor = settings, metrics, supervisor
    app.state.jobs = Jobs(supervisor)
    app.add_middleware(
        BodyLimit, limit=settings.max_body_bytes, room=settings.max_bodies_bytes, metrics=metrics
    )
    app.add_middleware(RequestContext, metrics=metrics)  # added last: outermost
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_framework_error)
    app.include_router(native.router)
    app.include_router(jobs.router)
    app.include_router(health.router)
    return app


def operation_id(route: APIRoute) -> str:
    return route.name


def respond(request: Request, error: ServiceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The error's answer, counted."""
    if request.method == "POST":
        request.app.state.metrics.rejected.labels(code_of(error)).inc()
    headers = dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(to_body(error, request.state.request_id), status_of(error), headers)


async def on_service_error(request: Request, error: ServiceError) -> JSONResponse:
    """Ours."""
    log.info("request %s: %d %s", request.state.request_id, status_of(error), code_of(error))
    return respond(request, error)


async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Pydantic's."""
    return respond(request, explain(error.errors(), request.headers.get("content-type", "")))


async def on_framework_error(request: Request, error: HTTPException) -> JSONResponse:
    """The framework's: unknown addresses and methods, bodies that are no JSON."""
    kind = FRAMEWORK.get(error.status_code, InvalidRequest if error.status_code < 500 else ServiceError)
    return respond(request, kind(), error.headers)  # a 405 says what is allowed

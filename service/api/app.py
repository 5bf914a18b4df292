"""The web application: its routes, middleware, error responses and lifespan."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, nullcontext

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Route, compile_path
from starlette.types import Scope

from service.api import activity, docs, health, jobs, models, native, openapi, page, preprocess
from service.api.a1111 import routes as a1111
from service.api.a1111.session import A1111Sessions
from service.api.auth import Identify, require_admin_key, require_key
from service.api.middleware import BodyLimit, HeadAndOptions, PathPrefix, RequestContext
from service.api.openai import routes as openai
from service.api.openai.kept_files import KeptFiles
from service.api.openai.model_names import aliases_of
from service.cluster.redis_quotas import RedisCounts
from service.cluster.redis_store import open_store
from service.cluster.shared_jobs import SharedJobs
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
from service.keys.keys import Keys
from service.keys.quotas import Quotas
from service.metrics import Metrics
from service.requests.background import Jobs
from service.requests.response_schemas import error_responses
from service.requests.signing import open_signer
from service.requests.validation_errors import explain
from service.requests.webhooks.deliveries import open_webhooks
from service.settings import Settings
from service.tracing import open_tracing
from service.worker.backend import Backend
from service.worker.supervisor import Supervisor

# The errors that the framework raises itself, by status.
FRAMEWORK_ERRORS: dict[int, type[ServiceError]] = {
    400: UnreadableBody,
    401: Unauthorized,
    404: NotFound,
    405: MethodNotAllowed,
}

# If API keys are set, these routes need one. PUBLIC routes never do: they reveal nothing about requests.
# /metrics has only counts, and Prometheus often has no key.
KEYED = (native.router, preprocess.router, jobs.router, activity.router, openai.router, a1111.router)
ADMIN = (models.router, a1111.admin_router)  # these need an admin key
PUBLIC = (health.router, docs.router, openai.file_router)

CORS_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
CORS_EXPOSED = (
    "X-Request-Id",
    "X-Seed",
    "Retry-After",
    "RateLimit",
    "RateLimit-Policy",
    "Location",
    "WWW-Authenticate",
)


def create_app(
    settings: Settings, open_backend: Callable[[Settings, Metrics], Backend] = Supervisor
) -> FastAPI:
    """The application, whose lifespan supervises the backend, by default workers on this machine.

    Raises SettingError if keys or secrets cannot be read, and for impossible replicas or a wrong job store.
    """
    keys = Keys(settings)
    metrics = Metrics()
    metrics.set_keys(keys.names)
    supervisor = open_backend(settings, metrics)
    metrics.queue_size.set(settings.queue_size)
    metrics.ready.set_function(lambda: supervisor.ready)
    metrics.jobs_running.set_function(lambda: supervisor.running)
    metrics.jobs_waiting.set_function(lambda: supervisor.slots_in_use - supervisor.running)

    tracing = open_tracing(settings)
    webhooks = open_webhooks(settings, metrics)
    store = open_store(settings, metrics) if settings.job_store else None
    quotas = Quotas(RedisCounts(store) if store else None)
    jobs = Jobs(supervisor, open_signer(settings), tracing, webhooks, quotas)
    shared = SharedJobs(jobs, store) if store else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        reader = asyncio.create_task(keys.watch(metrics.set_keys))
        async with supervisor.supervise(), shared.run() if shared else nullcontext():
            yield
        reader.cancel()
        if webhooks:
            await webhooks.close()
        await asyncio.to_thread(tracing.shut_down)

    app = FastAPI(
        title="Latent diffusion",
        lifespan=lifespan,
        generate_unique_id_function=operation_id,
        redirect_slashes=False,  # a redirect would go to the address in the Host header, which may be forged
        docs_url=None,  # docs.router serves the page from local files
        redoc_url=None,
    )
    app.state.settings, app.state.metrics, app.state.supervisor = settings, metrics, supervisor
    app.state.jobs, app.state.keys, app.state.quotas = jobs, keys, quotas
    app.state.job_board, app.state.tracing = shared or jobs, tracing
    app.state.openai_files = KeptFiles(settings)
    app.state.openai_aliases = aliases_of(settings)
    app.state.a1111, app.state.started = A1111Sessions(jobs), int(time.time())
    for router in KEYED:
        app.include_router(router, dependencies=[Depends(require_key)], responses=error_responses(401))
    for router in ADMIN:
        app.include_router(
            router, dependencies=[Depends(require_admin_key)], responses=error_responses(401, 403)
        )
    for router in PUBLIC if settings.no_page else (page.router, *PUBLIC):
        app.include_router(router)
    add_middleware(app, settings)
    for kind in (ServiceError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, on_error)
    openapi.install(app)
    return app


def add_middleware(app: FastAPI, settings: Settings) -> None:
    """Wrap the application in middleware; what is added last sees a request first."""
    metrics, supervisor = app.state.metrics, app.state.supervisor
    app.add_middleware(
        BodyLimit,
        limit=settings.max_body_bytes,
        total_limit=settings.max_bodies_bytes,
        seconds=settings.body_seconds,
        rate=settings.min_rate,
        metrics=metrics,
        admits=lambda scope: scope["state"]["caller"] is not None,
    )
    app.add_middleware(Identify, keys=app.state.keys, quotas=app.state.quotas, metrics=metrics)
    app.add_middleware(HeadAndOptions, methods_of=lambda scope: allowed_methods(app, scope))
    app.add_middleware(
        RequestContext, metrics=metrics, leaving=lambda: supervisor.draining, tracing=app.state.tracing
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=CORS_METHODS,
            allow_headers=["*"],
            expose_headers=CORS_EXPOSED,
        )
    if settings.root_path:
        app.add_middleware(PathPrefix, prefix=settings.root_path)


def allowed_methods(app: FastAPI, scope: Scope) -> list[str]:
    """The methods of the request's path, OPTIONS included; none if the path does not exist."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    methods = {
        method
        for pattern, route in walk(app.routes)
        if compile_path(pattern)[0].match(path)
        for method in route.methods or ()
    }
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods | {"OPTIONS"}) if methods else []


def walk(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[tuple[str, Route]]:
    """(path pattern, route) of all routes, including those of included routers."""
    for route in routes:
        if isinstance(route, Route):
            yield prefix + route.path, route
        elif included := getattr(route, "original_router", None):  # an included router in newer FastAPI
            yield from walk(included.routes, prefix + getattr(route, "include_context").prefix)  # noqa: B009


def operation_id(route: APIRoute) -> str:
    return route.name


async def on_error(request: Request, error: Exception) -> JSONResponse:
    """The response to an error of the service, of request validation or of the framework; counted."""
    failure = to_service_error(error, request)
    request.state.error_code = code_of(failure)
    if request.method == "POST":
        request.app.state.metrics.rejected.labels(code_of(failure)).inc()
    headers = {}
    if isinstance(failure, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(failure, MethodNotAllowed):
        headers["Allow"] = ", ".join(allowed_methods(request.app, request.scope))
    if failure.retry_after is not None:
        headers["Retry-After"] = str(failure.retry_after)
    return JSONResponse(to_body(failure, request.state.request_id), status_of(failure), headers)


def to_service_error(error: Exception, request: Request) -> ServiceError:
    """Any handled exception as one of the service's own errors."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, RequestValidationError):
        return explain(error.errors(), request.headers.get("content-type", ""))
    if isinstance(error, HTTPException) and error.status_code in FRAMEWORK_ERRORS:
        return FRAMEWORK_ERRORS[error.status_code]()
    if isinstance(error, HTTPException) and error.status_code < 500:
        return InvalidRequest()
    return ServiceError()

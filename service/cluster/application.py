"""The application for Ray Serve: API replicas without a GPU, and engine replicas with one each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any

import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from service.cluster.api import Api
from service.cluster.engine import Engine
from service.cluster.router import HoldingRouter
from service.settings import SettingError, Settings, read_settings
from service.worker.devices import count_cuda_devices

log = logging.getLogger(__name__)

ROOM = 2  # most jobs at an engine replica, as a multiple of jobs_per_engine; the next ones wait at the API
API_REQUESTS = 100_000  # no limit by Ray: the service itself limits the requests of a replica, with a 429
REPORT_SECONDS = 1.0  # between two reports to the router of which models a replica holds
HEALTH_SECONDS = 2.0  # between two health checks of a replica, which find that it has ended
END_MARGIN_SECONDS = 20.0  # beyond drain_seconds, after which Ray kills a replica that is to end
START_ATTEMPTS = 3  # to start a replica, after which Ray reports that the application cannot be deployed


class Arguments(BaseModel):
    """The arguments of the application."""

    model_config = ConfigDict(extra="forbid")

    api_replicas: Annotated[int, Field(ge=1, description="API replicas; several need job_store")] = 1
    min_engines: Annotated[
        int,
        Field(ge=0, description="engine replicas when there is no work; 0: the next request waits for one"),
    ] = 1
    max_engines: Annotated[int, Field(ge=1, description="engine replicas under load")] = 1
    jobs_per_engine: Annotated[
        int, Field(ge=1, description="open jobs of an engine replica above which there are more of them")
    ] = 8
    gpus_per_engine: Annotated[
        float | None, Field(ge=0, le=1, description="None: 1 if device is cuda, or auto and there is a GPU")
    ] = None
    cpus_per_engine: Annotated[
        float, Field(gt=0, description="CPU cores of an engine replica; on a CPU, also its threads")
    ] = 1


def build(arguments: Mapping[str, Any]) -> Application:
    """The application. Raises SettingError for a wrong argument or setting."""
    shape, settings = parse(arguments), read_settings()
    check(shape, settings)
    engines = serve.deployment(
        name="Engine",
        ray_actor_options={"num_gpus": gpus(shape, settings), "num_cpus": shape.cpus_per_engine},
        max_ongoing_requests=ROOM * shape.jobs_per_engine,
        autoscaling_config=AutoscalingConfig(
            min_replicas=shape.min_engines,
            max_replicas=shape.max_engines,
            target_ongoing_requests=shape.jobs_per_engine,
            upscale_delay_s=5.0,
            look_back_period_s=15.0,
        ),
        request_router_config={
            "request_router_class": HoldingRouter,
            "request_router_kwargs": {"enough": shape.jobs_per_engine},
            "request_routing_stats_period_s": REPORT_SECONDS,
        },
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_seconds + END_MARGIN_SECONDS,
        max_constructor_retry_count=START_ATTEMPTS,
    )(Engine)
    api = serve.deployment(
        name="Api",
        num_replicas=shape.api_replicas,
        ray_actor_options={"num_gpus": 0, "num_cpus": 1},
        max_ongoing_requests=API_REQUESTS,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_seconds + END_MARGIN_SECONDS,
        max_constructor_retry_count=START_ATTEMPTS,
    )(Api)
    return api.bind(settings, engines.bind(settings))


def parse(arguments: Mapping[str, Any]) -> Arguments:
    """Raises SettingError, which names the first wrong argument."""
    try:
        return Arguments.model_validate(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise SettingError(
                f"{name} is not an argument; expected one of {', '.join(Arguments.model_fields)}"
            ) from None
        raise SettingError(f"{name} is {first['input']!r}: {first['msg']}") from None


def check(shape: Arguments, settings: Settings) -> None:
    """Raise SettingError for settings that cannot hold in a cluster."""
    if shape.min_engines > shape.max_engines:
        raise SettingError(f"min_engines is {shape.min_engines}, but max_engines is {shape.max_engines}")
    if shape.api_replicas > 1 and not settings.job_store:
        raise SettingError(
            f"api_replicas is {shape.api_replicas}, but job_store is not set: several API replicas share the "
            "jobs of POST /jobs in Redis"
        )
    if settings.replicas not in ("auto", "1") or "," in settings.device or ":" in settings.device:
        raise SettingError(
            "an engine replica has one worker: replicas and lists in device cannot be used in a cluster; "
            "expected the argument max_engines"
        )
    if (settings.host, settings.port) != (Settings.host, Settings.port):
        log.warning("host and port are not used in a cluster: Ray Serve listens; see its http_options")


def gpus(shape: Arguments, settings: Settings) -> float:
    """The GPUs of each engine replica: those of the arguments, or one if the device is, or may be, a GPU."""
    if shape.gpus_per_engine is not None:
        return shape.gpus_per_engine
    if settings.device != "auto":
        return float(settings.device == "cuda")
    if not ray.is_initialized():  # `serve run` connects to the cluster later, or starts one on this machine
        return float(count_cuda_devices() > 0)
    found: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return float(found.get("GPU", 0) > 0)

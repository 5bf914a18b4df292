"""An API replica: the web application, without a worker, as an actor of Ray Serve."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.api.app import create_app
from service.cluster.backend import ClusterBackend
from service.settings import Settings


class OneRequestId:
    """Removes the header X-Request-Id from responses: Ray's proxy adds the same."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await self.app(scope, receive, send_without_id)


@serve.ingress()
class Api:
    """Serves every route of `ldm serve`; its jobs run at the engine replicas."""

    def __init__(self, settings: Settings, engines: DeploymentHandle[Any]) -> None:
        logs.set_up(settings)
        self.settings = settings
        self.engines = engines

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self.settings, partial(ClusterBackend, engines=self.engines))
        # Counters differ between API replicas: each has series of its own, whichever of them is asked.
        app.state.metrics.labels = {"api_replica": str(serve.get_replica_context().rank.rank)}
        app.add_middleware(OneRequestId)
        return app

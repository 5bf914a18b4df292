"""`ldm serve`: the HTTP server."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service import logs
from service.allocator import return_freed_memory
from service.api.app import create_app
from service.api.connections import MAX_HEADER_BYTES, Connections, limits_of, protocol_of
from service.api.openai.model_names import check_aliases
from service.catalogue import Folders
from service.cluster.redis_store import open_store
from service.errors import Unavailable
from service.metrics import Metrics
from service.model_paths import TINY_VAE, locate_folders, locate_vaes
from service.requests.background import Jobs
from service.settings import SettingError, Settings, misspelled
from service.worker.replica import WorkerFailed
from service.worker.supervisor import Supervisor

FETCH_SECONDS = 5.0  # after the drain, for clients to fetch finished background jobs
DELIVER_SECONDS = 5.0  # meanwhile, for webhooks of the last jobs to be delivered
LINGER_SECONDS = 1.0  # then, for clients that send another request: they get a 503, not a closed connection
GRACE_SECONDS = 10  # then, for responses that are still being sent

log = logging.getLogger(__name__)


def serve(settings: Settings) -> WorkerFailed | None:
    """Serve until SIGTERM or SIGINT, then finish running jobs. A second signal ends at once.

    Returns the reason if the server stopped because no worker could be started.
    """
    return_freed_memory()
    check_paths(settings)
    asyncio.run(check_store(settings))
    logs.set_up(settings)
    for warning in misspelled(os.environ):
        log.warning("%s", warning)
    server = DrainingServer(create_app(settings), settings)
    server.run()
    return server.supervisor.failure


def check_paths(settings: Settings) -> None:
    """Raise ModelPathError or SettingError for a wrong path or alias, before a worker is started."""
    locate_folders((*settings.model_dir, *settings.lora_dir))
    folders = Folders(settings)
    models = dict.fromkeys((*folders.taken["model"], *(e.name for e in folders.read().of("model"))))
    locate_vaes(settings.vae, models)
    locate_vaes(settings.tiny_vae, models, TINY_VAE)
    check_aliases(settings, models)


async def check_store(settings: Settings) -> None:
    """Raise SettingError for a job store that is set and does not answer."""
    if not settings.job_store:
        return
    store = open_store(settings, Metrics())
    try:
        await store.check()
    except Unavailable as error:
        raise SettingError(f"job_store does not answer: {error.__cause__}") from None
    finally:
        await store.close()


class DrainingServer(uvicorn.Server):
    """Finishes running jobs before it stops listening; stops at once if no worker can be started."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.open_connections = Connections(limits_of(settings))
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                log_level=settings.log_level,
                access_log=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
                http=protocol_of(self.open_connections),
                h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,  # so that its own limit is not met first
            )
        )
        self.supervisor: Supervisor = app.state.supervisor
        self.jobs: Jobs = app.state.jobs
        self.tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        watchers = self.stop_on_failure(), self.open_connections.watch()
        self.tasks += map(self.loop.create_task, watchers)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:  # no request has been accepted yet
            self.should_exit = True
        elif self.supervisor.draining:
            self.should_exit = self.force_exit = True
        else:
            self.loop.call_soon_threadsafe(self.begin_drain)

    def begin_drain(self) -> None:
        self.tasks.append(self.loop.create_task(self.drain()))

    async def drain(self) -> None:
        busy = self.supervisor.slots_in_use > 0
        fetched = self.loop.create_task(self.jobs.wait_until_fetched(FETCH_SECONDS))
        await self.supervisor.drain()
        await asyncio.gather(fetched, self.jobs.finish_webhooks(DELIVER_SECONDS))
        await asyncio.sleep(LINGER_SECONDS if busy else 0)
        self.should_exit = True

    async def stop_on_failure(self) -> None:
        await self.supervisor.failed.wait()
        self.should_exit = True

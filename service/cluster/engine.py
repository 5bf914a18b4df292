"""An engine replica: one worker process with its supervisor, as an actor of Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace

from prometheus_client import Metric
from ray import serve

from service import logs
from service.cli.serve import check_paths
from service.cluster.messages import EngineReport
from service.engine.events import Done
from service.engine.job import Job
from service.errors import ServiceError, Unavailable
from service.metrics import Metrics
from service.settings import Settings
from service.worker.progress import Progress, State
from service.worker.supervisor import Supervisor

PROGRESS_SECONDS = 0.25  # between two messages about a job in which only its step or queue position changes
POLL_SECONDS = 0.05  # between two looks whether the worker is ready
REPORTED_CALLS = 64  # the newest UNet calls in each report


class Engine:
    """Runs jobs in one worker process. When that ends, the supervisor here replaces it."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        """Returns when the worker is ready. Raises ModelPathError, SettingError or WorkerFailed."""
        self._supervision = AsyncExitStack()
        self.number = serve.get_replica_context().rank.rank
        logs.set_up(settings, replica=self.number)
        check_paths(settings)
        self.supervisor = Supervisor(settings, Metrics())
        self._runs: dict[str, asyncio.Task[Done]] = {}
        await self._supervision.enter_async_context(self.supervisor.supervise())
        while not self.supervisor.ready:
            if self.supervisor.failure:
                await self._supervision.aclose()
                raise self.supervisor.failure
            await asyncio.sleep(POLL_SECONDS)

    async def __del__(self) -> None:
        await self._supervision.aclose()

    def check_health(self) -> None:
        """Raise Unavailable if no worker can be started, so that Ray replaces this replica."""
        if not self.supervisor.alive:
            raise Unavailable(str(self.supervisor.failure or ""))

    def record_routing_stats(self) -> dict[str, list[str]]:
        """For router.HoldingRouter: the models, and models with LoRAs, that the worker holds."""
        return {"holds": sorted(map(str, self.supervisor.holds(0)))}

    async def run(self, job: Job) -> AsyncIterator[State | Done | ServiceError]:
        """Run a job: its states, then its result or its error. Ending the iteration cancels the job.

        If this replica is running the job already, its caller has lost the connection: that run is cancelled.
        """
        if earlier := self._runs.get(job.id):
            earlier.cancel()
            await asyncio.wait({earlier})
        progress = Progress()
        work = self._runs[job.id] = asyncio.create_task(self.supervisor.run(job, progress))
        try:
            async for state in paced(progress, work):
                yield state
            try:
                yield await work
            except ServiceError as error:
                yield error
        finally:
            work.cancel()
            if self._runs.get(job.id) is work:
                del self._runs[job.id]

    def interrupt(self, job_id: str) -> None:
        """End a running job early; unknown jobs are ignored."""
        self.supervisor.interrupt(job_id)

    async def rescan(self) -> EngineReport | ServiceError | None:
        """Read the folders of models again."""
        try:
            await self.supervisor.rescan()
        except ServiceError as error:
            return error
        return self.report()

    async def set_loaded(self, model: str, load: bool) -> EngineReport | ServiceError | None:
        """Load or unload a model."""
        try:
            await self.supervisor.set_loaded(model, load)
        except ServiceError as error:
            return error
        return self.report()

    def report(self) -> EngineReport | None:
        """The state of this replica; None while its worker starts again."""
        supervisor, models = self.supervisor, self.supervisor.models
        (own,), offer = supervisor.replica_states, models.offer_of(0)
        if offer is None:
            return None
        calls = supervisor.calls
        newest = [recorded.call for recorded in calls.after(calls.count - REPORTED_CALLS)]
        return EngineReport(
            replica=replace(own, number=self.number),
            catalogue=models.catalogue,
            offer=offer,
            loaded=models.loaded_at(0),
            families=tuple(self._families()),
            calls=tuple(newest),
            calls_made=calls.count,
        )

    def _families(self) -> Iterator[Metric]:
        """The metrics about the worker, with the number of this replica."""
        for family in self.supervisor.metrics.registry.collect():
            family.samples = [
                sample._replace(labels={**sample.labels, "replica": str(self.number)})
                for sample in family.samples
                if "replica" in sample.labels
            ]
            if family.samples:
                yield family


async def paced(progress: Progress, work: asyncio.Task[Done]) -> AsyncIterator[State]:
    """The states of a job until it ends.

    Changes of its step or queue position alone are shown every PROGRESS_SECONDS: each message costs about as
    much time as a small UNet call.
    """
    shown = progress.state
    while not work.done():
        state = await progress.after(shown)
        if (state.stage, state.preview) == (shown.stage, shown.preview):
            await asyncio.wait({work}, timeout=PROGRESS_SECONDS)
            state = progress.state
        if state.ended:
            return
        yield state
        shown = state

"""The backend of an API replica in a Ray cluster: engine replicas, which Ray starts, ends and chooses.

It keeps every job until it is answered: a job whose replica or node is lost runs again at another one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, cast

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from models.spec import ModelSpec
from service.cluster.messages import EngineReport
from service.engine.events import Done, LoadedModels
from service.engine.job import Job
from service.errors import (
    DeadlineExceeded,
    Draining,
    Loading,
    NotFound,
    ServiceError,
    Unavailable,
    WorkerLost,
)
from service.keys.client import ANYBODY, Client
from service.metrics import Metrics
from service.settings import Settings
from service.worker.backend import ReplicaState
from service.worker.call_log import CallLog
from service.worker.model_table import ModelTable
from service.worker.progress import Progress, State
from service.worker.slots import Slots, refusal

log = logging.getLogger(__name__)

REPORT_SECONDS = 1.0  # between two reports of the engine replicas
REPORT_TIMEOUT = 10.0  # seconds in which all must have answered
RETRY_SECONDS = 0.5  # before a job that has lost its replica is sent again
MAX_LOSSES = 10  # of replicas that had started a job, after which the job is refused


class ReplicaLost(Exception):  # noqa: N818 - no error of a request: the job runs again
    """The engine replica of a job has ended, or cannot be reached."""


@dataclass
class Ticket:
    """A job from its submission to its answer. refused: cancelled, as the service ends."""

    progress: Progress
    work: asyncio.Task[Done]
    refused: bool = False


class ClusterBackend:
    """Limits the number of open requests of this API replica, and sends their jobs to the engine replicas."""

    def __init__(self, settings: Settings, metrics: Metrics, engines: DeploymentHandle[Any]) -> None:
        self.settings = settings
        self.metrics = metrics
        self.calls = CallLog()
        self.models = ModelTable(settings)
        self.draining = False
        self._engines = engines
        self._slots = Slots(settings.queue_size)
        self._tickets: dict[str, Ticket] = {}
        self._reports: dict[int, EngineReport] = {}
        self._interrupts: set[asyncio.Task[Any]] = set()

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """Name -> spec of every model that requests can use."""
        return self.models.specs

    @property
    def slots_in_use(self) -> int:
        """The number of open requests of this API replica."""
        return self._slots.in_use

    @property
    def ready(self) -> bool:
        """Whether requests are accepted: engine replicas may start only when there are jobs."""
        return self.models.known and not self.draining

    @property
    def running(self) -> int:
        """The number of jobs that have started."""
        return sum(ticket.progress.state.stage == "running" for ticket in self._tickets.values())

    @property
    def alive(self) -> bool:
        """Always true: Ray starts engine replicas again."""
        return True

    @property
    def replica_states(self) -> list[ReplicaState]:
        """The engine replicas, as they were about a second ago."""
        return [self._reports[number].replica for number in sorted(self._reports)]

    def check_open(self) -> None:
        """Raise Draining, or Loading until the first engine replica was ready."""
        if self.draining:
            raise refusal(Draining)
        if not self.models.known:
            raise refusal(Loading)

    @contextmanager
    def reserve_slot(self, client: Client = ANYBODY) -> Iterator[None]:
        """Hold a slot of the queue until the context ends. Raises QueueFull, or as check_open() does."""
        self.check_open()
        with self._slots.reserve(client):
            yield

    async def run(self, job: Job, progress: Progress | None = None) -> Done:
        """As Backend.run(). Raises WorkerLost for a job that has lost MAX_LOSSES replicas."""
        if job.id in self._tickets:
            raise ValueError(f"job {job.id} is not answered yet")
        log.debug("job %s: %r", job.id, job.prompt, extra={"job": job.id})
        progress = progress or Progress()
        # In a context of its own, because Ray cancels all calls of a request's context with that request.
        work = asyncio.create_task(self._run_until_answered(job, progress), context=Context())
        ticket = self._tickets[job.id] = Ticket(progress, work)
        try:
            done = await work
        except asyncio.CancelledError:
            self.metrics.cancelled.labels("running" if progress.state.stage == "running" else "queued").inc()
            progress.end("cancelled")
            if ticket.refused:
                raise refusal(Draining) from None
            raise
        except BaseException:
            progress.end("failed")
            raise
        finally:
            work.cancel()
            del self._tickets[job.id]
        progress.end("done")
        return done

    async def _run_until_answered(self, job: Job, progress: Progress) -> Done:
        """Run a job again until a replica has answered. Raises the error of the job, and WorkerLost."""
        losses = 0
        while True:
            try:
                return await self._run_once(job, progress)
            except ReplicaLost as error:
                losses += progress.state.stage == "running"
                log.warning("job %s runs again: %s", job.id, error, extra={"job": job.id})
            if losses == MAX_LOSSES:
                raise WorkerLost
            await asyncio.sleep(RETRY_SECONDS)

    async def _run_once(self, job: Job, progress: Progress) -> Done:
        """Run a job at a replica. Raises the error of the job, and ReplicaLost."""
        call = self._engines.options(stream=True, method_name="run")
        answers = cast("DeploymentResponseGenerator[Any]", call.remote(job))
        try:
            async for answer in answers:
                match answer:
                    case State():
                        progress.follow(answer)
                    case Done():
                        return answer
                    case Unavailable():
                        raise ReplicaLost(answer.message)
                    case ServiceError():
                        raise answer
        except RayTaskError:
            log.exception("an engine replica has failed", extra={"job": job.id})
            raise ServiceError from None
        except (RayError, RayServeException) as error:
            raise ReplicaLost(first_line(error)) from error
        except asyncio.CancelledError:
            answers.cancel()  # type: ignore[no-untyped-call]
            raise
        raise ReplicaLost("the replica has ended")

    def interrupt(self, job_id: str) -> None:
        """End a running job early, with its images as they are; other jobs are left alone."""
        if job_id in self._tickets:
            task = asyncio.create_task(self._broadcast("interrupt", job_id, seconds=REPORT_TIMEOUT))
            self._interrupts.add(task)
            task.add_done_callback(self._interrupts.discard)

    async def rescan(self) -> None:
        """Read the folders of models again at every engine replica. Raises DeadlineExceeded."""
        await self._at_every_replica("rescan")

    async def set_loaded(self, model: str, load: bool) -> None:
        """As Backend.set_loaded(), at the engine replicas of this moment."""
        if model not in self.specs:
            known = ", ".join(self.specs) or "none: there is no model"
            raise NotFound(f"model does not exist; expected one of {known}", param="name")
        await self._at_every_replica("set_loaded", model, load)

    async def _at_every_replica(self, method: str, *values: object) -> None:
        """Call a method of all engine replicas; if there is none, of one that Ray starts for this call.

        Raises the first error of one, and DeadlineExceeded.
        """
        try:
            answers = await self._broadcast(method, *values, seconds=self.settings.timeout)
            if not answers:
                call = self._engines.options(method_name=method).remote(*values)
                answers = [await asyncio.wait_for(call, self.settings.timeout)]
        except TimeoutError:
            raise DeadlineExceeded from None
        for answer in answers:
            if isinstance(answer, ServiceError):
                raise answer
        self._take(answers)

    async def _broadcast(self, method: str, *values: object, seconds: float) -> list[Any]:
        """The answers of all engine replicas that live. Raises TimeoutError."""
        call = self._engines.broadcast(method, *values)
        try:
            answers = await call.results_async(timeout_s=seconds, return_exceptions=True)
        except (RayError, RayServeException):  # there is none
            return []
        return [answer for answer in answers if not isinstance(answer, RayError)]

    @asynccontextmanager
    async def supervise(self) -> AsyncIterator[None]:
        """Collect the reports of the engine replicas while the context lasts; at its end, finish all jobs."""
        reporting = asyncio.create_task(self._collect_reports())
        try:
            yield
        finally:
            await self.drain()
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)

    async def drain(self) -> None:
        """Accept no more requests; wait until all are answered, and after drain_seconds refuse the rest."""
        self.draining = True
        await self._slots.wait_until_free(self.settings.drain_seconds)
        for ticket in self._tickets.values():
            ticket.refused = True
            ticket.work.cancel()
        await asyncio.sleep(0)

    async def _collect_reports(self) -> None:
        while True:
            try:
                if self.models.known:
                    answers = await self._broadcast("report", seconds=REPORT_TIMEOUT)
                else:  # waits for the first replica, and has Ray start one if there is none
                    answers = [await self._engines.options(method_name="report").remote()]
                self._take(answers)
            except (RayError, RayServeException, TimeoutError) as error:
                log.warning("the engine replicas do not report: %s", first_line(error))
            await asyncio.sleep(REPORT_SECONDS)

    def _take(self, answers: Iterable[Any]) -> None:
        """Replace the state of all engine replicas by their reports."""
        reports = {answer.replica.number: answer for answer in answers if isinstance(answer, EngineReport)}
        for number in self._reports.keys() - reports.keys():
            self.models.lose(number)
        for number, report in reports.items():
            self._record_calls(report)
            self.models.catalogue = report.catalogue
            self.models.take(number, report.offer)
            self.models.set_loaded(number, LoadedModels(report.loaded))
        self._reports = reports
        self.metrics.elsewhere = [family for report in reports.values() for family in report.families]

    def _record_calls(self, report: EngineReport) -> None:
        """Append the UNet calls since the replica's last report to those of this process."""
        before = self._reports.get(report.replica.number)
        new = report.calls_made - (before.calls_made if before else 0)
        for call in report.calls[-new:] if new > 0 else ():
            self.calls.record(report.replica.number, call)


def first_line(error: Exception) -> str:
    """What an error of Ray says, without the traceback of the other process."""
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]

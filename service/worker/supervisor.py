"""The supervisor, in the API process: one queue for all replicas. It keeps every job until it is answered."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial

from models.spec import ModelSpec
from service.engine.events import (
    CallEnded,
    Cancelled,
    Done,
    Failed,
    Loaded,
    LoadedModels,
    Previewed,
    QueuePosition,
    QueuePositions,
    Started,
    Stepped,
    Withdrawn,
)
from service.engine.job import Job, ModelKey
from service.errors import (
    DeadlineExceeded,
    Draining,
    JobFailed,
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
from service.worker.devices import settings_of_replicas
from service.worker.model_table import ModelTable, error_of
from service.worker.placement import Placement
from service.worker.progress import Progress, State
from service.worker.protocol import (
    Cancel,
    Heartbeat,
    Interrupt,
    Offer,
    Ready,
    Rejected,
    Report,
    SetLoaded,
    UnreadableMessageError,
    Withdraw,
)
from service.worker.quarantine import Cause, Quarantine
from service.worker.replica import Replica, WorkerFailed
from service.worker.slots import Slots, refusal

log = logging.getLogger(__name__)


@dataclass
class Ticket:
    """A job in the API process, from its submission to its answer."""

    job: Job
    answer: asyncio.Future[Done]
    progress: Progress
    running: bool = False  # in its current worker; `progress` covers earlier workers too

    def fail(self, error: ServiceError) -> None:
        """Answer with an error, unless there is an answer or the client has left."""
        if not self.answer.done():
            self.answer.set_exception(error)

    def close(self) -> None:
        """Set the final stage of the job's progress; a job without an answer was cancelled."""
        if not self.answer.done() or self.answer.cancelled():
            self.progress.end("cancelled")
        else:
            self.progress.end("failed" if self.answer.exception() else "done")


class Supervisor:
    """Limits the number of open requests, and shares their jobs among the replicas.

    It keeps every job until it is answered: workers may die. Raises SettingError for impossible replicas.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.calls = CallLog()
        self.models = ModelTable(settings)
        self.draining = False
        self.failure: WorkerFailed | None = None
        self.failed = asyncio.Event()
        each = settings_of_replicas(settings)
        self.replicas = [Replica(number, own, metrics, self) for number, own in enumerate(each)]
        self._tickets: dict[str, Ticket] = {}
        self._quarantine = Quarantine()
        self._placement = Placement(settings.max_rows)
        self._timer: asyncio.TimerHandle | None = None  # for suspects; see quiet time in quarantine.py
        self._closed_by: type[ServiceError] | None = None  # the error that every new job gets
        self._slots = Slots(settings.queue_size)
        for replica in self.replicas:
            metrics.replica_ready.labels(replica.label).set_function(partial(getattr, replica, "is_ready"))
            metrics.replica_jobs.labels(replica.label).set_function(partial(self.jobs_at, replica))

    @property
    def specs(self) -> dict[str, ModelSpec]:
        """Name -> spec of every model that requests can use."""
        return self.models.specs

    @property
    def slots_in_use(self) -> int:
        """The number of open requests."""
        return self._slots.in_use

    @property
    def ready(self) -> bool:
        """Whether requests are accepted and a replica is ready for them."""
        return any(replica.is_ready for replica in self.replicas) and not self.draining

    @property
    def running(self) -> int:
        """The number of jobs that have started."""
        return sum(ticket.running for ticket in self._tickets.values())

    @property
    def alive(self) -> bool:
        """Whether the service can serve, now or after a restart of workers: see Replica.alive."""
        return self.failure is None and any(replica.alive for replica in self.replicas)

    @property
    def replica_states(self) -> Sequence[ReplicaState]:
        """All replicas, as /health shows them."""
        return [
            ReplicaState(replica.number, replica.device, replica.status, self.jobs_at(replica))
            for replica in self.replicas
        ]

    def jobs_at(self, replica: Replica) -> int:
        """The number of jobs that a replica has."""
        return len(self._quarantine.jobs_of(replica.number))

    def holds(self, replica: int) -> frozenset[ModelKey]:
        """The models, and models with LoRAs, that a replica's worker has loaded."""
        return self._placement.holds(replica)

    def check_open(self) -> None:
        """Raise Draining, Loading or Unavailable if no request can be accepted now."""
        if self.failure is not None:
            raise refusal(Unavailable)
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
        """Run a job. Cancelling this coroutine cancels the job.

        progress: updated while the job runs. Raises the ServiceError that the job failed with, and ValueError
        if an unanswered job has the same id.
        """
        if job.id in self._tickets:
            raise ValueError(f"job {job.id} is not answered yet")
        if self._closed_by:
            raise refusal(self._closed_by)
        log.debug("job %s: %r", job.id, job.prompt, extra={"job": job.id})
        ticket = Ticket(job, asyncio.get_running_loop().create_future(), progress or Progress())
        self._tickets[job.id] = ticket
        self._quarantine.add(job.id)
        self._dispatch()
        try:
            return await ticket.answer
        finally:
            self._close(ticket)

    def interrupt(self, job_id: str) -> None:
        """End a running job early, with its images as they are; other jobs are left alone."""
        if (ticket := self._tickets.get(job_id)) and ticket.running:
            self._send_about(job_id, Interrupt(job_id))

    async def rescan(self) -> None:
        """Read the folders of models again; returns when every worker serves what is there.

        Raises DeadlineExceeded.
        """
        catalogue = await self.models.read_again()
        for replica in self.replicas:
            replica.send(catalogue)
        await self._within_timeout(self.models.wait_for(catalogue.number), DeadlineExceeded())

    async def set_loaded(self, model: str, load: bool) -> None:
        """Load a model at every replica, or unload it where no job uses it any more.

        Raises NotFound, the error that loading failed with, and ModelInUse for a model that was in use until
        the timeout.
        """
        if model not in self.specs:
            known = ", ".join(self.specs) or "none: there is no model"
            raise NotFound(f"model does not exist; expected one of {known}", param="name")
        ready = [replica for replica in self.replicas if replica.is_ready]
        if not ready:
            raise refusal(Loading)
        call = uuid.uuid4().hex
        answers = self.models.begin_call(call, model, [replica.number for replica in ready])
        too_late = DeadlineExceeded() if load else error_of("model_in_use", model)
        try:
            for replica in ready:
                replica.send(SetLoaded(call, model, load))
            await self._within_timeout(asyncio.gather(*answers), too_late)
        finally:
            self.models.forget_call(call)
            for replica in ready:
                replica.send(Cancel(call))

    async def _within_timeout(self, work: Awaitable[object], too_late: ServiceError) -> None:
        """Wait for work. Raises `too_late` after the timeout of requests."""
        try:
            await asyncio.wait_for(work, self.settings.timeout)
        except TimeoutError:
            raise too_late from None

    def watch(self, job_id: str) -> AsyncIterator[State]:
        """The state of an unanswered job: now, and after each change. Raises NotFound."""
        if job_id not in self._tickets:
            raise NotFound("there is no such job")
        return self._tickets[job_id].progress.watch()

    def _close(self, ticket: Ticket) -> None:
        """Forget a job; if it has no answer, cancel it at its replica too."""
        job = ticket.job.id
        ticket.close()
        if ticket.progress.state.stage == "cancelled":
            self.metrics.cancelled.labels("running" if ticket.running else "queued").inc()
            self._send_about(job, Cancel(job))
        del self._tickets[job]
        self._quarantine.remove(job)
        self._placement.remove(job)
        self._dispatch()

    def _send_about(self, job: str, command: Cancel | Interrupt | Withdraw) -> None:
        """Send a message about a job to the replica that has it, if any."""
        number = self._quarantine.worker_of(job)
        if number is not None:
            self.replicas[number].send(command)

    def _dispatch(self) -> None:
        """Send the jobs that the quarantine releases to replicas; move jobs from busy replicas to others."""
        ages = {replica.number: replica.age for replica in self.replicas if replica.is_ready}
        released = self._quarantine.release(ages)
        if released.suspect is not None and released.reserved is not None:
            self._send(released.suspect, released.reserved)
        open_to_jobs = ages.keys() - {released.reserved}
        for job in released.jobs if open_to_jobs else ():
            self._send(job, self._placement.choose(self._tickets[job].job, open_to_jobs))
        for move in self._placement.moves(open_to_jobs):
            self._send_about(move.job, Withdraw(move.job))
        self._dispatch_after(self._quarantine.quiet_left(ages) if ages else 0.0)

    def _dispatch_after(self, seconds: float) -> None:
        if self._timer:
            self._timer.cancel()
        if seconds:
            self._timer = asyncio.get_running_loop().call_later(seconds + 0.01, self._dispatch)

    def _send(self, job: str, replica: int) -> None:
        self._quarantine.send(job, replica)
        self._placement.send(self._tickets[job].job, replica)
        self.replicas[replica].submit(self._tickets[job].job)

    async def drain(self) -> None:
        """Accept no more requests; wait until all are answered, and after drain_seconds refuse the rest."""
        self.draining = True
        await self._slots.wait_until_free(self.settings.drain_seconds)
        self._refuse_all(Draining)

    def _refuse_all(self, kind: type[ServiceError]) -> None:
        """Refuse every job without an answer, and every later one."""
        self._closed_by = kind
        self._refuse_open(kind)

    def _refuse_open(self, kind: type[ServiceError]) -> None:
        for ticket in self._tickets.values():
            ticket.fail(refusal(kind))

    @asynccontextmanager
    async def supervise(self) -> AsyncIterator[None]:
        """Keep a worker running at every replica for as long as the context lasts."""
        tasks = [asyncio.create_task(replica.keep_running()) for replica in self.replicas]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # What replicas report: see replica.Owner.

    def gave_up(self, replica: Replica) -> None:
        """Go on with the other replicas; fail if there are none left, or if a setting is the reason."""
        wrong_from_the_start = replica.failure and replica.failure.fatal and not replica.was_ready
        if wrong_from_the_start or not any(other.failure is None for other in self.replicas):
            self.failure = replica.failure
            self.failed.set()
            self._refuse_all(Unavailable)

    def cannot_start(self, replica: Replica) -> None:
        """Refuse the open jobs, unless another replica can run them."""
        if not any(other.is_ready for other in self.replicas):
            self._refuse_open(Unavailable)

    def requeue(self, replica: Replica, cause: Cause, age: float) -> None:
        """Run the replica's jobs again, at any replica, except those that the quarantine refuses."""
        for job in self._quarantine.jobs_of(replica.number):
            if ticket := self._tickets.get(job):
                ticket.running = False
        self._placement.clear(replica.number)
        self.models.lose(replica.number)
        for job in self._quarantine.end(replica.number, cause, age):
            log.error("job %s is refused: it made workers die", job, extra={"job": job})
            self._tickets[job].fail(WorkerLost())
        self._dispatch()

    def reject(self, replica: Replica, error: UnreadableMessageError) -> None:
        """Count an unreadable message. If it may have been the end of a job, the job fails: none follows."""
        log.error("the worker sent an %s", error, extra={"replica": replica.number})
        self.metrics.unreadable_messages.inc()
        if error.kind not in ("Started", "Previewed"):
            self._fail(error.job, JobFailed())

    def handle(self, replica: Replica, report: Report) -> None:
        """Act on a message about jobs or models."""
        match report:
            case Heartbeat(holds=holds):
                self._placement.hold(replica.number, holds)
                if not self.jobs_at(replica):  # a job may move to it
                    self._dispatch()
            case Ready(holds):
                self._placement.hold(replica.number, holds)
                self._dispatch()
            case Offer():
                self.models.take(replica.number, report)
            case LoadedModels():
                self.models.set_loaded(replica.number, report)
            case CallEnded():
                self.models.end_call(replica.number, report)
            case Rejected(job, reason):
                log.error(
                    "the worker could not read a message: %s", reason, extra={"replica": replica.number}
                )
                self.metrics.unreadable_messages.inc()
                self._fail(job, JobFailed())
            case QueuePositions(positions):
                self._show_positions(positions)
            case Loaded(key, seconds):
                self._placement.load(key, seconds)
            case Started(job, steps):
                self._start(job, steps)
            case Stepped():
                self._count_step(replica, report)
            case Previewed(job):
                if ticket := self._tickets.get(job):
                    ticket.progress.show(report)
            case Done(job):
                ticket = self._tickets.get(job)
                if ticket and not ticket.answer.done():  # otherwise the client has left
                    ticket.answer.set_result(report)
            case Failed(job, code):
                if ticket := self._tickets.get(job):
                    ticket.fail(error_of(code, *(key.model for key in ticket.job.model_keys)))
            case Withdrawn(job):
                self._move(job)
            case Cancelled():
                pass  # its ticket is closed already

    def _fail(self, job: str | None, error: ServiceError) -> None:
        """Answer a job with an error; an unknown one is left alone."""
        if job is not None and (ticket := self._tickets.get(job)):
            ticket.fail(error)

    def _move(self, job: str) -> None:
        """Place a job again that its replica has given back."""
        self._quarantine.recall(job)
        self._placement.remove(job)
        self._dispatch()

    def _show_positions(self, positions: Sequence[QueuePosition]) -> None:
        for job, position, seconds in positions:
            if ticket := self._tickets.get(job):
                ticket.progress.wait_at(position, seconds)

    def _start(self, job: str, steps: int) -> None:
        self._quarantine.start(job)
        self._placement.start(job, steps)
        if ticket := self._tickets.get(job):
            ticket.running = True
            ticket.progress.start(steps)

    def _count_step(self, replica: Replica, event: Stepped) -> None:
        self.calls.record(replica.number, event)
        self._placement.step(event)
        for job, steps, rows in event.jobs:
            self._quarantine.step(job, steps)
            if ticket := self._tickets.get(job):
                ticket.progress.advance(steps, event.seconds * rows / event.rows)

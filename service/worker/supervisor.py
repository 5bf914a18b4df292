"""The supervisor, in the API process: starts, watches and replaces the worker, and runs its jobs again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

from models.spec import ModelSpec
from service.engine.events import (
    Cancelled,
    Decoded,
    Done,
    Failed,
    Incident,
    Previewed,
    QueuePosition,
    QueuePositions,
    Started,
    Stepped,
)
from service.engine.job import Job
from service.errors import (
    Draining,
    JobFailed,
    Loading,
    NotFound,
    QueueFull,
    ServiceError,
    Unavailable,
    WorkerLost,
    from_code,
)
from service.metrics import Metrics
from service.settings import Settings
from service.worker import child, protocol
from service.worker.call_log import CallLog
from service.worker.child import WorkerProcess
from service.worker.progress import Progress, State
from service.worker.protocol import (
    Cancel,
    Fatal,
    Heartbeat,
    Interrupt,
    Ready,
    Rejected,
    Report,
    Submit,
    UnreadableMessageError,
)
from service.worker.quarantine import Cause, Quarantine

log = logging.getLogger(__name__)

MAX_FAILURES = 5  # workers in a row that failed without having had a job, after which the service gives up
MAX_KILLED_STARTS = 10  # workers in a row killed before they were ready, after which open jobs are refused
WATCH_SECONDS = 0.5  # between two checks whether the worker has stalled
RETRY_AFTER = {QueueFull: 5, Loading: 5, Draining: 30, Unavailable: 30}  # seconds


class WorkerFailed(Exception):  # noqa: N818 - not an error of a request
    """No worker can be started. The message is for the operator."""


@dataclass
class Ticket:
    """A job in the API process, from its submission to its answer."""

    job: Job
    answer: asyncio.Future[Done]
    progress: Progress
    running: bool = False  # in the current worker; `progress` covers earlier workers too

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
    """Limits the number of open requests, and keeps every job until it is answered: workers may die."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.calls = CallLog()
        self.specs: dict[str, ModelSpec] = {}
        self.slots_in_use = 0
        self.draining = False
        self.failure: WorkerFailed | None = None
        self.failed = asyncio.Event()
        self._tickets: dict[str, Ticket] = {}
        self._quarantine = Quarantine()
        self._worker: WorkerProcess | None = None
        self._timer: asyncio.TimerHandle | None = None  # for suspects; see quiet time in quarantine.py
        self._closed_by: type[ServiceError] | None = None  # the error that every new job gets
        self._no_slots_in_use = asyncio.Event()
        self._no_slots_in_use.set()

    @property
    def ready(self) -> bool:
        """Whether requests are accepted and a worker is ready for them."""
        return self._worker is not None and self._worker.is_ready and not self.draining

    @property
    def running(self) -> int:
        """The number of jobs that have started."""
        return sum(ticket.running for ticket in self._tickets.values())

    @property
    def alive(self) -> bool:
        """Whether the worker sent a message within the stall limit, or a new worker is about to start."""
        silence = self._worker.silence if self._worker else 0.0
        return self.failure is None and silence < self.settings.stall_seconds

    def check_open(self) -> None:
        """Raise Draining, Loading or Unavailable if no request can be accepted now."""
        if self.failure is not None:
            raise refusal(Unavailable)
        if self.draining:
            raise refusal(Draining)
        if not self.specs:
            raise refusal(Loading)

    @contextmanager
    def reserve_slot(self) -> Iterator[None]:
        """Hold a slot of the queue until the context ends. Raises QueueFull, or as check_open() does."""
        self.check_open()
        if self.slots_in_use >= self.settings.queue_size:
            raise refusal(QueueFull)
        self.slots_in_use += 1
        self._no_slots_in_use.clear()
        try:
            yield
        finally:
            self.slots_in_use -= 1
            if not self.slots_in_use:
                self._no_slots_in_use.set()

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
        if (ticket := self._tickets.get(job_id)) and ticket.running and self._worker:
            self._worker.send(Interrupt(job_id))

    def watch(self, job_id: str) -> AsyncIterator[State]:
        """The state of an unanswered job: now, and after each change. Raises NotFound."""
        if job_id not in self._tickets:
            raise NotFound("there is no such job")
        return self._tickets[job_id].progress.watch()

    def _close(self, ticket: Ticket) -> None:
        """Forget a job; if it has no answer, cancel it in the worker too."""
        job = ticket.job.id
        was_sent = self._quarantine.remove(job)
        del self._tickets[job]
        ticket.close()
        if ticket.progress.state.stage == "cancelled":
            self.metrics.cancelled.labels("running" if ticket.running else "queued").inc()
            if was_sent and self._worker:
                self._worker.send(Cancel(job))
        self._dispatch()

    def _dispatch(self) -> None:
        """Send the worker the jobs that the quarantine releases."""
        worker = self._worker
        if worker is None or not worker.is_ready:
            return
        for job in self._quarantine.release(worker.age):
            worker.had_jobs = True
            worker.send(Submit(self._tickets[job].job))
        if self._timer:
            self._timer.cancel()
        if seconds := self._quarantine.quiet_left(worker.age):
            self._timer = asyncio.get_running_loop().call_later(seconds + 0.01, self._dispatch)

    async def drain(self) -> None:
        """Accept no more requests; wait until all are answered, and after drain_seconds refuse the rest."""
        self.draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._no_slots_in_use.wait(), self.settings.drain_seconds)
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
        """Keep a worker running for as long as the context lasts."""
        task = asyncio.create_task(self._keep_worker_running())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _keep_worker_running(self) -> None:
        """Run one worker after the other until the service must give up."""
        failures = killed_starts = 0
        try:
            while failures < MAX_FAILURES:
                end = await self._run_worker()
                self.metrics.worker_restarts.inc()
                failures = failures + 1 if end == "failed" else 0
                killed_starts = killed_starts + 1 if end == "killed before ready" else 0
                if killed_starts and killed_starts % MAX_KILLED_STARTS == 0:
                    log.error("%d workers in a row were killed while they started", killed_starts)
                    self._refuse_open(Unavailable)
                await asyncio.sleep(min(0.25 * 2**failures, 10) if failures else 0)
            raise WorkerFailed(f"{MAX_FAILURES} workers in a row ended without having run a job")
        except WorkerFailed as error:
            log.critical("%s", error)
            self.failure = error
            self.failed.set()
            self._refuse_all(Unavailable)

    async def _run_worker(self) -> str:
        """Run one worker to its end; returns "ended", "failed" or "killed before ready".

        A worker has failed if it could not be started, or if it crashed without ever having had a job. Raises
        WorkerFailed.
        """
        try:
            worker = self._worker = await child.spawn(self.settings)
        except OSError:
            log.exception("no worker could be started")
            return "failed"
        watch = asyncio.create_task(self._watch(worker))
        try:
            await self._listen(worker)
        finally:
            age = worker.age
            watch.cancel()
            self._worker = None
            await worker.end()
        cause = worker.cause_of_end()
        log.warning("the worker ended (exit code %s, counted as a %s)", worker.process.returncode, cause)
        self._requeue(cause, age)
        if cause == "crash":
            return "ended" if worker.had_jobs else "failed"
        return "ended" if worker.is_ready else "killed before ready"

    def _requeue(self, cause: Cause, age: float) -> None:
        """Run every unanswered job again, except those that the quarantine refuses."""
        for ticket in self._tickets.values():
            ticket.running = False
        for job in self._quarantine.end(cause, age):
            log.error("job %s is refused: it made workers die", job, extra={"job": job})
            self._tickets[job].fail(WorkerLost())

    async def _watch(self, worker: WorkerProcess) -> None:
        """Kill a worker that has stalled."""
        limit = self.settings.stall_seconds
        while not worker.is_stalled(limit):
            await asyncio.sleep(min(WATCH_SECONDS, limit / 4))
        log.error("the worker has stalled; replacing it")
        worker.kill()

    async def _listen(self, worker: WorkerProcess) -> None:
        """Handle the worker's messages until it ends. Raises WorkerFailed."""
        try:
            while True:
                frame = await protocol.receive_frame(worker.reader)
                worker.last_message = worker.clock()
                try:
                    report = protocol.decode_report(frame)
                except UnreadableMessageError as error:
                    self._reject(error)
                else:
                    self._handle(worker, report)
        except asyncio.IncompleteReadError:
            return
        except ConnectionError as error:
            log.warning("the connection to the worker is lost: %s", error)

    def _reject(self, error: UnreadableMessageError) -> None:
        """Count an unreadable message. If it may have been the end of a job, the job fails: none follows."""
        log.error("the worker sent an %s", error)
        self.metrics.unreadable_messages.inc()
        if error.kind not in ("Started", "Previewed"):
            self._fail(error.job, JobFailed())

    def _handle(self, worker: WorkerProcess, report: Report) -> None:
        """Act on a message of the worker. Raises WorkerFailed."""
        match report:
            case Heartbeat(memory=memory):
                worker.beat(report)
                self.metrics.device_memory.labels("used").set(memory)
            case Ready():
                self._start_serving(worker, report)
            case Fatal(message):
                raise WorkerFailed(message)
            case Rejected(job, reason):
                log.error("the worker could not read a message: %s", reason)
                self.metrics.unreadable_messages.inc()
                self._fail(job, JobFailed())
            case QueuePositions(positions):
                self._show_positions(positions)
            case Started(job, steps):
                self._start(job, steps)
            case Stepped():
                self._count_step(worker, report)
            case Decoded(seconds):
                self.metrics.decode_seconds.observe(seconds)
            case Previewed(job):
                if ticket := self._tickets.get(job):
                    ticket.progress.show(report)
            case Incident():
                self.metrics.count_incident(report)
            case Done(job):
                ticket = self._tickets.get(job)
                if ticket and not ticket.answer.done():  # otherwise the client has left
                    ticket.answer.set_result(report)
            case Failed(job, code):
                self._fail(job, from_code(code))
            case Cancelled():
                pass  # its ticket is closed already

    def _fail(self, job: str | None, error: ServiceError) -> None:
        """Answer a job with an error; an unknown one is left alone."""
        if job is not None and (ticket := self._tickets.get(job)):
            ticket.fail(error)

    def _start_serving(self, worker: WorkerProcess, ready: Ready) -> None:
        """Take the worker's models, log the duration of its start, and send it the jobs."""
        self.specs = {spec.name: spec for spec in ready.specs}
        total = worker.become_ready()
        parts = dict(ready.parts)
        parts = {"Python": total - sum(parts.values())} | parts
        self.metrics.started(total, parts, ready.memory)
        rounded = {name: round(seconds, 3) for name, seconds in parts.items()}
        shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items() if seconds >= 0.005)
        log.info("ready in %.2f s: %s", total, shown, extra={"seconds": round(total, 3), "parts": rounded})
        self._dispatch()

    def _show_positions(self, positions: Sequence[QueuePosition]) -> None:
        for job, position, seconds in positions:
            if ticket := self._tickets.get(job):
                ticket.progress.wait_at(position, seconds)

    def _start(self, job: str, steps: int) -> None:
        self._quarantine.start(job)
        if ticket := self._tickets.get(job):
            ticket.running = True
            ticket.progress.start(steps)

    def _count_step(self, worker: WorkerProcess, event: Stepped) -> None:
        self.metrics.stepped(event)
        if not worker.stepped:
            worker.stepped = True
            numbers = {"rows": event.padded, "seconds": round(event.seconds, 3)}
            log.info("the first UNet call took %.2f s", event.seconds, extra=numbers)
        self.calls.record(event)
        for job, steps, _ in event.jobs:
            self._quarantine.step(job, steps)
            if ticket := self._tickets.get(job):
                ticket.progress.advance(steps)


def refusal(kind: type[ServiceError]) -> ServiceError:
    """An error of this kind, with its Retry-After seconds."""
    return kind(retry_after=RETRY_AFTER[kind])

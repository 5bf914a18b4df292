"""The API process's side of the worker: starts it, watches it, starts it again and replays its jobs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

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
from service.settings import Settings, to_environment
from service.worker import protocol
from service.worker.progress import Progress, State
from service.worker.protocol import (
    Cancel,
    Command,
    Fatal,
    Heartbeat,
    Ready,
    Rejected,
    Report,
    Submit,
    UnreadableMessageError,
)

log = logging.getLogger(__name__)

SUSPECT_AFTER = 2  # crashes while running, after which a job runs alone
FALLS = 8  # crashes while alone, after which it is refused wherever they came
STARTS = 5  # in a row without a worker that gets ready; then the service gives up
WATCH_SECONDS = 0.5
BURY_SECONDS = 2.0
LOADING_PATIENCE = 10  # times the stall limit, for a worker that beats and loads a model
RETRY_AFTER = {QueueFull: 5, Loading: 5, Draining: 30, Unavailable: 30}  # seconds


class WorkerFailed(Exception):  # noqa: N818 - not an error of a request
    """No worker can be had; the message is for the operator."""


@dataclass
class Ticket:
    """A job in the API process, from its submission to its answer."""

    job: Job
    answer: asyncio.Future[Done]
    progress: Progress
    sent: bool = False
    running: bool = False  # in the worker of now; `progress` has seen the ones before too
    step: int = 0  # done in the worker of now
    crashes: int = 0  # in a row, of workers that were running it
    falls: list[int] = field(default_factory=list)  # its step at each crash of a worker that ran it alone

    @property
    def suspect(self) -> bool:
        """Whether it may be what ends the workers, and so runs alone."""
        return self.crashes >= SUSPECT_AFTER

    @property
    def poison(self) -> bool:
        """Whether it is: alone, twice at the same step. Workers that others kill end at any step."""
        return len(set(self.falls)) < len(self.falls) or len(self.falls) >= FALLS

    def fall(self) -> None:
        """Its worker has ended; it starts again."""
        if self.running:
            if self.suspect:
                self.falls.append(self.step)
            self.crashes += 1
        self.sent, self.running, self.step = False, False, 0

    def end(self) -> None:
        """Tell those who watch how it ended; without an answer it was given up."""
        if not self.answer.done() or self.answer.cancelled():
            self.progress.end("cancelled")
        else:
            self.progress.end("failed" if self.answer.exception() else "done")


@dataclass
class Life:
    """One worker process, and when it last said or did something."""

    process: subprocess.Popen
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ready: bool = False
    stalled: bool = False
    loading: bool = True
    ticks: int = -1
    begun: float = field(default_factory=time.monotonic)
    stepped: bool = False
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)

    @property
    def blameless(self) -> bool:
        """Whether its end says nothing against the next one: it was ready once, or others killed it."""
        return self.ready or (self.process.returncode == -signal.SIGKILL and not self.stalled)

    def overdue(self, limit: float) -> bool:
        """Whether it has said nothing, or done nothing that it should have, for longer than the limit."""
        now, patience = time.monotonic(), LOADING_PATIENCE if self.loading else 1
        return now - self.heard > limit or now - self.moved > patience * limit

    def kill(self) -> None:
        """End it even where the system is slow to: the socket closes now."""
        self.stalled = True
        self.process.kill()
        self.writer.transport.abort()

    def send(self, command: Command) -> None:
        if not self.writer.is_closing():
            self.writer.write(protocol.encode(command))


class Supervisor:
    """Holds the places of the queue and every unanswered job; survives its workers."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.specs: dict[str, ModelSpec] = {}
        self.slots_in_use = 0  # taken
        self.draining = False
        self.failure: WorkerFailed | None = None
        self.failed = asyncio.Event()
        self._tickets: dict[str, Ticket] = {}
        self._life: Life | None = None
        self._ended: type[ServiceError] | None = None  # what is left is refused with
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """Whether a model is loaded and nothing drains."""
        return self._life is not None and self._life.ready and not self.draining

    @property
    def running(self) -> int:
        """Jobs that have begun."""
        return sum(ticket.running for ticket in self._tickets.values())

    @property
    def alive(self) -> bool:
        """Whether a worker has been heard of within the stall limit, or is about to be started."""
        return self.failure is None and (
            self._life is None or time.monotonic() - self._life.heard < self.settings.stall_seconds
        )

    def check_open(self) -> None:
        """Raise Draining, Loading or Unavailable where no request can be taken now."""
        for kind, closed in (
            (Unavailable, self.failure is not None),
            (Draining, self.draining),
            (Loading, not self.specs),
        ):
            if closed:
                raise self._refusal(kind)

    @contextmanager
    def reserve_slot(self) -> Iterator[None]:
        """A place in the queue for as long as the context lasts. Raises QueueFull and as check_open()."""
        self.check_open()
        if self.slots_in_use >= self.settings.queue_size:
            raise self._refusal(QueueFull)
        self.slots_in_use += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.slots_in_use -= 1
            if not self.slots_in_use:
                self._idle.set()

    def _refusal(self, kind: type[ServiceError]) -> ServiceError:
        return kind(retry_after=RETRY_AFTER[kind])

    async def run(self, job: Job, progress: Progress | None = None) -> Done:
        """The finished job; cancelling this coroutine frees the job's rows. Raises the job's ServiceError.

        progress: told how far the job is, as watch() tells.
        """
        if self._ended:
            raise self._refusal(self._ended)
        log.debug("job %s: %r", job.id, job.prompt, extra={"job": job.id})
        ticket = Ticket(job, asyncio.get_running_loop().create_future(), progress or Progress())
        self._tickets[job.id] = ticket
        self._dispatch()
        try:
            return await ticket.answer
        finally:
            self._close(ticket)

    def watch(self, job_id: str) -> AsyncIterator[State]:
        """How far an unanswered job is: now, and whenever that has changed. Raises NotFound."""
        if job_id not in self._tickets:
            raise NotFound("there is no such job")
        return self._tickets[job_id].progress.watch()

    def _close(self, ticket: Ticket) -> None:
        """Forget a job; one without an answer is cancelled in the worker too."""
        del self._tickets[ticket.job.id]
        ticket.end()
        if ticket.progress.state.stage == "cancelled":
            self.metrics.cancelled.labels("running" if ticket.running else "queued").inc()
            if ticket.sent and self._life:
                self._life.send(Cancel(ticket.job.id))
        self._dispatch()

    def _dispatch(self) -> None:
        """Send what may run now: everything, or one suspect by itself."""
        if self._life is None or not self._life.ready:
            return
        tickets = self._tickets.values()
        suspects = [ticket for ticket in tickets if ticket.suspect]
        if not suspects:
            allowed = list(tickets)
        else:
            allowed = [] if any(ticket.sent for ticket in tickets) else suspects[:1]
        for ticket in allowed:
            if not ticket.sent:
                ticket.sent = True
                self._life.send(Submit(ticket.job))

    async def drain(self) -> None:
        """Take nothing new; return when all is answered, or refuse the rest when the time for that is up."""
        self.draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self.settings.drain_seconds)
        self._end(Draining)

    def _end(self, kind: type[ServiceError]) -> None:
        """Refuse every job that has no answer, and whatever job comes after."""
        self._ended = kind
        for ticket in self._tickets.values():
            if not ticket.answer.done():
                ticket.answer.set_exception(self._refusal(kind))

    @asynccontextmanager
    async def supervise(self) -> AsyncIterator[None]:
        """Keep a worker alive for as long as the context lasts."""
        task = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _keep(self) -> None:
        """One worker after the other, until one fails for good."""
        failures = 0
        try:
            while failures < STARTS:
                failures = 0 if await self._live() else failures + 1
                self.metrics.worker_restarts.inc()
                await asyncio.sleep(min(0.25 * 2**failures, 10) if failures else 0)
            raise WorkerFailed(f"the worker died {STARTS} times before it was ready")
        except WorkerFailed as error:
            log.critical("%s", error)
            self._give_up(error)

    def _give_up(self, error: WorkerFailed) -> None:
        self.failure = error
        self.failed.set()
        self._end(Unavailable)

    async def _live(self) -> bool:
        """One worker's life; returns whether its end says nothing against the next. Raises WorkerFailed."""
        try:
            life = await spawn(self.settings)
        except OSError:
            log.exception("no worker could be started")
            return False
        self._life = life
        watch = asyncio.create_task(self._watch(life))
        try:
            await self._listen(life)
        finally:
            watch.cancel()
            self._life = None
            await bury(life)
        log.warning("the worker is gone (exit code %s)", life.process.returncode)
        self._requeue()
        return life.blameless

    def _requeue(self) -> None:
        """Every unanswered job starts again, but what was found to end workers is refused."""
        for ticket in self._tickets.values():
            ticket.fall()
            if ticket.poison and not ticket.answer.done():
                ticket.answer.set_exception(WorkerLost())

    async def _watch(self, life: Life) -> None:
        """Kill a worker that is silent, or that turns no more although it has work."""
        limit = self.settings.stall_seconds
        while not life.overdue(limit):
            await asyncio.sleep(min(WATCH_SECONDS, limit / 4))
        log.error("the worker has stalled; replacing it")
        life.kill()

    async def _listen(self, life: Life) -> None:
        """Take messages until the worker ends. Raises WorkerFailed."""
        try:
            while True:
                frame = await protocol.receive_frame(life.reader)
                life.heard = time.monotonic()
                try:
                    report = protocol.decode_report(frame)
                except UnreadableMessageError as error:
                    self._unreadable(error)
                else:
                    self._take(life, report)
        except asyncio.IncompleteReadError:
            return
        except ConnectionError as error:
            log.warning("the connection to the worker is lost: %s", error)

    def _unreadable(self, error: UnreadableMessageError) -> None:
        """Count a message that cannot be read; if it ended a job, the job fails, since no other will come."""
        log.error("the worker sent an %s", error)
        self.metrics.unreadable_messages.inc()
        if error.kind not in ("Started", "Previewed"):
            self._fail(error.job, JobFailed())

    def _fail(self, job: str | None, error: ServiceError) -> None:
        """Answer a job with an error; one that has its answer, or that nobody waits for, is left alone."""
        ticket = self._tickets.get(job or "")
        if ticket and not ticket.answer.done():
            ticket.answer.set_exception(error)

    def _take(self, life: Life, report: Report) -> None:
        """Act on a message of the worker. Raises WorkerFailed."""
        match report:
            case Heartbeat():
                self._beat(life, report)
            case Ready():
                self._ready(life, report)
            case Fatal(message):
                raise WorkerFailed(message)
            case Rejected(job, reason):
                log.error("the worker rejected a message: %s", reason)
                self.metrics.unreadable_messages.inc()
                self._fail(job, JobFailed())
            case QueuePositions(positions):
                self._wait_at(positions)
            case Started(job, steps):
                self._started(job, steps)
            case Stepped():
                self._stepped(life, report)
            case Decoded(seconds):
                self.metrics.decode_seconds.observe(seconds)
            case Previewed():
                if ticket := self._tickets.get(report.job):
                    ticket.progress.show(report)
            case Incident():
                self.metrics.troubled(report)
            case Done():
                ticket = self._tickets.get(report.job)
                if ticket and not ticket.answer.done():  # else its client has left
                    ticket.answer.set_result(report)
            case Failed(job, code):
                self._fail(job, from_code(code))
            case Cancelled():
                pass  # the ticket is closed already

    def _ready(self, life: Life, report: Ready) -> None:
        self.specs = {spec.name: spec for spec in report.specs}
        life.ready, life.loading, life.moved = True, False, time.monotonic()
        self._tell_start(life, report.memory, dict(report.parts))
        self._dispatch()

    def _tell_start(self, life: Life, memory: int, parts: dict[str, float]) -> None:
        """Where the time of a start went, in one line."""
        total = life.moved - life.begun
        parts = {"Python": total - sum(parts.values())} | parts
        self.metrics.started(total, parts, memory)
        told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items() if seconds >= 0.005)
        rounded = {name: round(seconds, 3) for name, seconds in parts.items()}
        log.info("ready in %.2f s: %s", total, told, extra={"seconds": round(total, 3), "parts": rounded})

    def _beat(self, life: Life, beat: Heartbeat) -> None:
        self.metrics.device_memory.labels("used").set(beat.memory)
        if beat.ticks != life.ticks or not beat.busy or life.loading != beat.loading:
            life.ticks, life.moved, life.loading = beat.ticks, time.monotonic(), beat.loading

    def _stepped(self, life: Life, event: Stepped) -> None:
        self.metrics.stepped(event)
        if not life.stepped:
            life.stepped = True
            seconds = {"rows": event.padded, "seconds": round(event.seconds, 3)}
            log.info("the first UNet call took %.2f s", event.seconds, extra=seconds)
        for job, steps in event.jobs:
            if ticket := self._tickets.get(job):
                ticket.step = steps
                ticket.progress.advance(steps)

    def _wait_at(self, positions: Sequence[QueuePosition]) -> None:
        for job, position, seconds in positions:
            if ticket := self._tickets.get(job):
                ticket.progress.wait_at(position, seconds)

    def _started(self, job: str, steps: int) -> None:
        if ticket := self._tickets.get(job):
            ticket.running = True
            ticket.progress.start(steps)


async def spawn(settings: Settings) -> Life:
    """A new worker process at the other end of a new socket pair."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "service.worker.process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the whole group (a terminal's) is ours to handle
        )
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    return Life(process, reader, writer)


def environment(settings: Settings) -> dict[str, str]:
    """The worker's: our settings, and this very package where it is not installed. -P keeps the rest out."""
    home = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "")
    installed = map(os.path.realpath, (*site.getsitepackages(), site.getusersitepackages()))
    if home not in installed:
        path = home + (os.pathsep + path if path else "")
    return to_environment(settings, os.environ) | {"PYTHONPATH": path}


async def bury(life: Life) -> None:
    """Cut the socket, which ends the worker, and see that it does end; never waits long for that."""
    life.writer.transport.abort()  # not close(): that waits until a worker that reads no more has read all
    try:
        if not await ends(life.process):
            life.process.kill()
            if not await ends(life.process):
                log.error("worker %d does not die; left behind", life.process.pid)
    except asyncio.CancelledError:
        life.process.kill()
        raise


async def ends(process: subprocess.Popen) -> bool:
    """Whether it ends within BURY_SECONDS."""
    try:
        await asyncio.to_thread(process.wait, BURY_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True

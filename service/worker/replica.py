"""A replica: one worker process after the other on one device, each watched, and replaced when it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Literal, Protocol

from service.engine.events import Decoded, Incident, Overflowed, Stepped
from service.engine.graph_counts import GraphCounts
from service.engine.job import Job
from service.metrics import Metrics
from service.model_paths import ModelPathError
from service.settings import Settings
from service.worker import child, protocol
from service.worker.child import WorkerProcess
from service.worker.model_table import ModelTable
from service.worker.protocol import (
    CAPTURE_EXIT,
    Command,
    Fatal,
    Heartbeat,
    Ready,
    Report,
    Submit,
    UnreadableMessageError,
)
from service.worker.quarantine import Cause

log = logging.getLogger(__name__)

MAX_FAILURES = 5  # workers in a row that failed without having had a job, after which a replica gives up
MAX_KILLED_STARTS = 10  # workers in a row killed before they were ready, after which open jobs are refused
WATCH_SECONDS = 0.5  # between two checks whether the worker has stalled

End = Literal["ended", "failed", "killed before ready"]


class WorkerFailed(Exception):  # noqa: N818 - not an error of a request
    """No worker can be started. The message is for the operator.

    fatal: a worker reported that every other one would fail too; wrong_setting: because of a setting.
    """

    def __init__(self, message: str, fatal: bool = False, wrong_setting: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal
        self.wrong_setting = wrong_setting


class Owner(Protocol):
    """What a replica reports to. models: with the catalogue for its workers."""

    models: ModelTable

    def handle(self, replica: Replica, report: Report) -> None:
        """A message of the replica's worker about jobs, or that the worker is ready."""

    def reject(self, replica: Replica, error: UnreadableMessageError) -> None:
        """A message of the replica's worker could not be read."""

    def requeue(self, replica: Replica, cause: Cause, age: float) -> None:
        """The replica's worker has ended, after it had been ready for `age` seconds."""

    def cannot_start(self, replica: Replica) -> None:
        """MAX_KILLED_STARTS workers in a row were killed before they were ready."""

    def gave_up(self, replica: Replica) -> None:
        """The replica starts no more workers; its `failure` is the reason."""


class Replica:
    """One worker at a time, on one device. settings: of its workers; number: from 0."""

    def __init__(self, number: int, settings: Settings, metrics: Metrics, owner: Owner) -> None:
        self.number = number
        self.settings = settings
        self.metrics = metrics
        self.owner = owner
        self.worker: WorkerProcess | None = None
        self.device = settings.device
        self.graphs = GraphCounts()  # of its worker
        self.was_ready = False  # a worker of it has been ready
        self.failure: WorkerFailed | None = None
        metrics.add_replica(self.label)

    @property
    def label(self) -> str:
        """The replica's name in metrics and logs."""
        return str(self.number)

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs now."""
        return self.worker is not None and self.worker.is_ready

    @property
    def age(self) -> float:
        """Seconds since its worker became ready; 0 without one."""
        return self.worker.age if self.worker else 0.0

    @property
    def alive(self) -> bool:
        """Whether its worker sent a message within the stall limit, or a new one is about to start."""
        silent = self.worker is not None and self.worker.is_silent(self.settings.stall_seconds)
        return self.failure is None and not silent

    @property
    def status(self) -> Literal["ok", "loading", "failed"]:
        if not self.alive:
            return "failed"
        return "ok" if self.is_ready else "loading"

    def send(self, command: Command) -> None:
        """Send its worker a message; without a worker, nothing happens."""
        if self.worker:
            self.worker.send(command)

    def submit(self, job: Job) -> None:
        """Send its worker a job."""
        if self.worker:
            self.worker.had_jobs = True
            self.worker.send(Submit(job))

    async def keep_running(self) -> None:
        """Run one worker after the other until the replica must give up."""
        failures = killed_starts = 0
        try:
            while failures < MAX_FAILURES:
                end = await self._run_worker()
                self.metrics.worker_restarts.labels(self.label).inc()
                failures = failures + 1 if end == "failed" else 0
                killed_starts = killed_starts + 1 if end == "killed before ready" else 0
                if killed_starts and killed_starts % MAX_KILLED_STARTS == 0:
                    self._log(
                        logging.ERROR, "%d workers in a row were killed while they started", killed_starts
                    )
                    self.owner.cannot_start(self)
                await asyncio.sleep(min(0.25 * 2**failures, 10) if failures else 0)
            raise WorkerFailed(f"{MAX_FAILURES} workers in a row ended without having run a job")
        except WorkerFailed as error:
            self._log(logging.CRITICAL, "%s", error)
            self.failure = error
            self.owner.gave_up(self)

    async def _run_worker(self) -> End:
        """Run one worker to its end.

        A worker has failed if it could not be started, or if it crashed without ever having had a job. Raises
        WorkerFailed.
        """
        try:
            await self.owner.models.read_once()
            worker = self.worker = await child.spawn(self.settings, self.number)
        except ModelPathError as error:
            raise WorkerFailed(str(error), fatal=True) from error
        except OSError:
            log.exception("no worker could be started", extra={"replica": self.number})
            return "failed"
        self.graphs = GraphCounts()
        worker.send(self.owner.models.catalogue)
        watch = asyncio.create_task(self._watch(worker))
        try:
            await self.listen()
        finally:
            age = worker.age
            watch.cancel()
            self.worker = None
            await worker.end()
        cause = worker.cause_of_end()
        code = worker.process.returncode
        self._log(logging.WARNING, "the worker ended (exit code %s, counted as a %s)", code, cause)
        if code == CAPTURE_EXIT:
            self.settings = dataclasses.replace(self.settings, no_graphs=True)
        self.owner.requeue(self, cause, age)
        if cause == "crash":
            return "ended" if worker.had_jobs else "failed"
        return "ended" if worker.is_ready else "killed before ready"

    async def _watch(self, worker: WorkerProcess) -> None:
        """Kill a worker that has stalled."""
        limit = self.settings.stall_seconds
        while not worker.is_stalled(limit):
            await asyncio.sleep(min(WATCH_SECONDS, limit / 4))
        self._log(logging.ERROR, "the worker has stalled; replacing it")
        worker.kill()

    async def listen(self) -> None:
        """Handle the worker's messages until it ends. Raises WorkerFailed."""
        worker = self.worker
        assert worker is not None
        try:
            while True:
                frame = await protocol.receive_frame(worker.reader)
                worker.last_message = worker.clock()
                try:
                    report = protocol.decode_report(frame)
                except UnreadableMessageError as error:
                    self.owner.reject(self, error)
                else:
                    self.receive(report)
        except asyncio.IncompleteReadError:
            return
        except ConnectionError as error:
            self._log(logging.WARNING, "the connection to the worker is lost: %s", error)

    def receive(self, report: Report) -> None:
        """Act on a message of the worker; what is about jobs goes to the owner. Raises WorkerFailed."""
        match report:
            case Heartbeat(memory=memory):
                if self.worker:
                    self.worker.beat(report)
                self.metrics.count_graphs(self.label, report.graphs, self.graphs)
                self.graphs = report.graphs
                self.metrics.device_memory.labels("used", self.label).set(memory)
            case Fatal(message, wrong_setting):
                raise WorkerFailed(message, True, wrong_setting)
            case Decoded(seconds):
                self.metrics.decode_seconds.labels(self.label).observe(seconds)
            case Incident():
                self.metrics.count_incident(self.label, report)
            case Overflowed(model):
                self.metrics.overflowed_models.labels(self.label).inc()
                self._log(logging.WARNING, "%s overflowed in float16; it runs in bfloat16", model)
            case Ready():
                self._become_ready(report)
            case Stepped():
                self._count_step(report)
        self.owner.handle(self, report)

    def _become_ready(self, ready: Ready) -> None:
        """Log the duration of the worker's start."""
        assert self.worker is not None
        self.device, self.was_ready = ready.device, True
        total = self.worker.become_ready()
        parts = dict(ready.parts)
        parts = {"Python": total - sum(parts.values())} | parts
        self.metrics.started(self.label, total, parts, ready.memory)
        rounded = {name: round(seconds, 3) for name, seconds in parts.items()}
        shown = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items() if seconds >= 0.005)
        more = {"seconds": round(total, 3), "parts": rounded}
        self._log(logging.INFO, "ready in %.2f s: %s", total, shown, **more)

    def _count_step(self, event: Stepped) -> None:
        self.metrics.stepped(self.label, event)
        if self.worker and not self.worker.stepped:
            self.worker.stepped = True
            numbers = {"rows": event.padded, "seconds": round(event.seconds, 3)}
            self._log(logging.INFO, "the first UNet call took %.2f s", event.seconds, **numbers)

    def _log(self, level: int, message: str, *values: object, **fields: object) -> None:
        log.log(level, message, *values, extra={"replica": self.number, **fields})

"""The loop: inbox -> scheduler -> runner -> events. Knows no tensors and no processes."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.errors import code_of
from service.job import Cancelled, Done, Event, Failed, ImageKey, Job, Shape, Started, Stepped
from service.scheduler import Scheduler

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine asks of the device. A call that raises leaves the images it was given as they were."""

    def shape(self, job: Job) -> Shape:
        """What the scheduler must know of a job."""

    def start(self, job: Job) -> tuple[str, ...]:
        """Make what the job's images start from; returns warnings for the client."""

    def step(self, keys: Sequence[ImageKey]) -> int:
        """One UNet call for one image each of one group; returns the rows it ran, padding included."""

    def finish(self, key: ImageKey) -> bytes:
        """The picture of an image that is through: height x width x 3 bytes."""

    def discard(self, job: str) -> None:
        """Forget all that is held for a job."""


@dataclass
class Progress:
    """A job under way, and when (seconds) it came to each part."""

    job: Job
    received: float
    steps: int = 0  # of all its images together
    done: int = 0  # of those
    begun: float = 0.0
    denoised: float = 0.0
    started: bool = False
    warnings: tuple[str, ...] = ()
    pictures: dict[int, bytes] = field(default_factory=dict)


class Engine:
    """Runs jobs; every job submitted ends in exactly one Done, Failed or Cancelled."""

    def __init__(
        self,
        runner: Runner,
        emit: Callable[[Event], None],
        max_rows: int,
        decode_chunk: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.emit = emit
        self.scheduler = Scheduler(max_rows)
        self.decode_chunk = decode_chunk
        self.clock = clock
        self.jobs: dict[str, Progress] = {}
        self.latents: deque[ImageKey] = deque()  # through the UNet, not yet through D

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def submit(self, job: Job) -> None:
        """Queue a job; one that cannot even be queued fails at once."""
        progress = self.jobs[job.id] = Progress(job, self.clock())
        try:
            shape = self.runner.shape(job)
            progress.steps = job.n * shape.evaluations
            self.scheduler.admit(job.id, shape, job.n, job.rows, job.priority)
        except Exception as error:
            self._fail(job.id, error)

    def cancel(self, job: str) -> None:
        """Give up a job, queued or running; one that has ended already is left alone."""
        if job in self.jobs:
            self._forget(job)
            self.emit(Cancelled(job))

    def tick(self) -> None:
        """At most one UNet call and one chunk of D."""
        picked = self._started(self.scheduler.pick())
        if picked:
            self._advance(self._step(picked))
        for _ in range(self.decode_chunk):
            if self.latents:  # a failure takes the rest of its job out
                self._decode(self.latents.popleft())

    def _started(self, keys: list[ImageKey]) -> list[ImageKey]:
        """The picked images of jobs that have begun, or that begin now without failing."""
        for job in dict.fromkeys(key.job for key in keys):
            if not self.jobs[job].started:
                self._start(job)
        return [key for key in keys if key.job in self.jobs]

    def _start(self, job: str) -> None:
        progress = self.jobs[job]
        progress.started, progress.begun = True, self.clock()
        self.emit(Started(job, progress.steps))
        try:
            progress.warnings = self.runner.start(progress.job)
        except Exception as error:
            self._fail(job, error)

    def _step(self, keys: list[ImageKey]) -> list[ImageKey]:
        """Step all at once; after a failure each job by itself. Returns the images that made it."""
        try:
            self._call(keys)
            return keys
        except Exception as error:
            jobs = list(dict.fromkeys(key.job for key in keys))
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return []
            log.warning("a call of %d jobs failed (%s); trying each alone", len(jobs), type(error).__name__)
        return [key for job in jobs for key in self._step([key for key in keys if key.job == job])]

    def _call(self, keys: list[ImageKey]) -> None:
        begin = self.clock()
        padded = self.runner.step(keys)
        seconds = self.clock() - begin
        rows = 0
        for key in keys:
            progress = self.jobs[key.job]
            progress.done += 1
            rows += progress.job.rows
        running = sum(progress.started for progress in self.jobs.values())
        jobs = tuple((job, self.jobs[job].done) for job in dict.fromkeys(key.job for key in keys))
        self.emit(Stepped(rows, padded, len(keys), seconds, running, len(self.jobs) - running, jobs))

    def _advance(self, keys: list[ImageKey]) -> None:
        for key in self.scheduler.advance(keys):
            self.jobs[key.job].denoised = self.clock()
            self.latents.append(key)

    def _decode(self, key: ImageKey) -> None:
        progress = self.jobs[key.job]
        try:
            progress.pictures[key.index] = self.runner.finish(key)
        except Exception as error:
            self._fail(key.job, error)
        else:
            if len(progress.pictures) == progress.job.n:
                self._finish(progress)

    def _finish(self, progress: Progress) -> None:
        job = progress.job
        self._forget(job.id)
        self.emit(
            Done(
                job.id,
                pictures=tuple(progress.pictures[index] for index in range(job.n)),
                warnings=progress.warnings,
                queue=progress.begun - progress.received,
                denoise=progress.denoised - progress.begun,
                decode=self.clock() - progress.denoised,
            )
        )

    def _fail(self, job: str, error: Exception) -> None:
        log.error("job %s failed", job, exc_info=error)
        self._forget(job)
        self.emit(Failed(job, code_of(error)))

    def _forget(self, job: str) -> None:
        del self.jobs[job]
        self.scheduler.remove(job)
        self.latents = deque(key for key in self.latents if key.job != job)
        self.runner.discard(job)

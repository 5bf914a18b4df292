"""The loop: inbox -> scheduler -> runner -> events. Knows no tensors and no processes."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cachetools import LRUCache

from service.engine.events import (
    Cancelled,
    Decoded,
    Done,
    Event,
    Failed,
    Incident,
    IncidentKind,
    JobSteps,
    Previewed,
    QueuePosition,
    QueuePositions,
    Stage,
    Started,
    Stepped,
)
from service.engine.job import ImageKey, Job, ModelKey, Shape
from service.engine.row_limits import GROUPS, Limits, Use
from service.engine.scheduler import Scheduler
from service.errors import NonFinite, OutOfMemory, code_of

log = logging.getLogger(__name__)

TELL_SECONDS = 0.5  # between two reports of where the waiting jobs stand
DOOR_PATIENCE = 10.0  # seconds after which a job whose network has no room lets no later one pass
CALL_SECONDS = 1.0  # that a call of more than the fewest rows may take: a job that comes waits for its end
MEMORY = 0.2  # share of the newest call in the running average of speed


@dataclass(frozen=True)
class Call:
    """What became of one UNet call. rows: run, padding included; broken: jobs whose numbers are none now;
    use: the memory it took, where that is news. late: the device is still at it; broken jobs are those of the
    call before, and seconds what that one took, where it is known."""

    rows: int
    broken: tuple[str, ...] = ()
    use: Use | None = None
    late: bool = False
    seconds: float | None = None


class Timed(NamedTuple):
    """A call whose time is not known yet. rows: of images; padded: run."""

    shape: Shape
    rows: int
    padded: int


class Preview(NamedTuple):
    """height x width x 3 bytes."""

    width: int
    height: int
    pixels: bytes


class Runner(Protocol):
    """What the engine asks of the device. A call that raises leaves the images it was given as they were."""

    buckets: tuple[int, ...]  # row counts that calls are padded to, rising

    def shape(self, job: Job, precise: bool = False) -> Shape:
        """What the scheduler must know of a job, for sure once ready(); precise: of its run in float32."""

    def ready(self, job: Job, busy: Collection[ModelKey]) -> bool:
        """Load or merge the job's network if it is not; False where it does not fit beside the busy ones."""

    def start(self, job: Job, precise: bool = False) -> tuple[str, ...]:
        """Make what the job's images start from; returns warnings for the client."""

    def step(self, keys: Sequence[ImageKey]) -> Call:
        """One UNet call for one image each of one group. Raises OutOfMemory where fewer may fit."""

    def settle(self) -> tuple[str, ...]:
        """Wait for the device; the broken jobs that no call has told of."""

    def preview(self, key: ImageKey) -> Preview:
        """What an image under way looks like."""

    def finish(self, key: ImageKey) -> bytes:
        """The picture of an image that is through: height x width x 3 bytes."""

    def discard(self, job: str) -> None:
        """Forget all that is held for a job."""


@dataclass
class Progress:
    """A job under way, and when (seconds) it came to each part."""

    job: Job
    received: float
    shape: Shape | None = None
    precise: bool = False  # it runs again, in float32
    told: bool = False  # that it has started
    entered: bool = False  # it is past the door
    steps: dict[int, int] = field(default_factory=dict)  # of each image
    furthest: dict[int, int] = field(default_factory=dict)  # the most it ever had; told once
    begun: float = 0.0
    denoised: float = 0.0
    started: bool = False
    warnings: tuple[str, ...] = ()
    pictures: dict[int, bytes] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """What the scheduler has of the job: images, or the tiles that they are made of."""
        return self.job.n * self.shape.parts

    def count(self, index: int) -> bool:
        """One more step of an image; returns whether it never had so many."""
        self.steps[index] = step = self.steps.get(index, 0) + 1
        news = step > self.furthest.get(index, 0)
        if news:
            self.furthest[index] = step
        return news


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
        self.limits = Limits(runner.buckets)
        self.decode_chunk = decode_chunk
        self.clock = clock
        self.jobs: dict[str, Progress] = {}
        self.door: dict[str, None] = {}  # jobs whose network is not known to be there, by arrival
        self.networks: dict[ModelKey, int] = {}  # jobs past the door, by what they run on
        self.latents: deque[ImageKey] = deque()  # through the UNet, not yet through D
        self.owed = 0.0  # seconds that D has had less than the UNet
        self.pace: float | None = None  # seconds for one unit of work
        self.last: Timed | None = None  # call
        self.row_seconds: LRUCache[Hashable, float] = LRUCache(GROUPS)  # of a row of a call
        self.decoded = 0  # pictures so far
        self.next_report = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    @property
    def waiting(self) -> int:
        """Jobs that have had no step."""
        return len(self.door) + self.scheduler.waiting

    def submit(self, job: Job) -> None:
        """Queue a job; one that cannot even be queued fails at once. Raises ValueError for one there is."""
        if job.id in self.jobs:
            raise ValueError(f"job {job.id} is here already")
        progress = self.jobs[job.id] = Progress(job, self.clock())
        self.next_report = 0.0
        try:
            progress.shape = self.runner.shape(job)
        except Exception as error:
            self._fail(job.id, error)
        else:
            self.door[job.id] = None

    def cancel(self, job: str) -> None:
        """Give up a job, queued or running; one that has ended already is left alone."""
        if job in self.jobs:
            self._forget(job)
            self.emit(Cancelled(job))

    def interrupt(self, job: str) -> None:
        """Take no more steps of a job that has started; its images are decoded as they are."""
        progress = self.jobs.get(job)
        if progress is None or not progress.started:
            return
        self.scheduler.remove(job)
        progress.denoised = self.clock()
        ready = {key.index for key in self.latents if key.job == job} | set(progress.pictures)
        left = (index for index in range(progress.units) if index not in ready)
        self.latents.extend(ImageKey(job, index) for index in left)

    def tick(self) -> None:
        """At most one UNet call, and about as long of D."""
        self._open_door()
        picked = self._started(self.scheduler.pick())
        self._report()
        begin = self.clock()
        if picked:
            self._step(picked)
        if self.latents:  # what D is given must be known to be numbers
            self._mend(self.runner.settle())
        self._decode_some(self.clock() - begin if picked else None)

    def _open_door(self) -> None:
        """Let in whose network is there or can be; nobody passes one who has waited too long."""
        for job in list(self.door):
            progress = self.jobs[job]
            try:
                enters = self.runner.ready(progress.job, tuple(self.networks))
                if enters:
                    self._enter(progress)
            except Exception as error:
                self._note(error, "load")
                self._fail(job, error)
                continue
            if not enters and self.clock() - progress.received >= DOOR_PATIENCE:
                break

    def _enter(self, progress: Progress) -> None:
        job = progress.job
        # Again: what it is told may have a length that only the loaded model knows.
        shape = progress.shape = self.runner.shape(job, progress.precise)
        self.scheduler.admit(job.id, shape, progress.units, job.rows, job.priority)
        self.door.pop(job.id, None)
        progress.entered = True
        self.networks[job.model_key] = self.networks.get(job.model_key, 0) + 1
        self.limits.cautious(shape.group)
        self._limit(shape.group)

    def _limit(self, group: Hashable) -> None:
        """Calls of so many rows as memory holds, and as end soon enough."""
        seconds = self.row_seconds.get(group, 0.0)
        soon = [size for size in self.runner.buckets if size * seconds <= CALL_SECONDS]
        rows = max(soon, default=self.runner.buckets[0])
        self.scheduler.limit(group, min(self.limits.rows(group), rows))

    def _leave(self, progress: Progress) -> None:
        """The inverse of _enter; one that is not in is left alone."""
        job = progress.job
        if not progress.entered:
            return
        progress.entered = False
        self.scheduler.remove(job.id)
        self.networks[job.model_key] -= 1
        if not self.networks[job.model_key]:
            del self.networks[job.model_key]

    def _started(self, keys: list[ImageKey]) -> list[ImageKey]:
        """The picked images of jobs that have begun, or that begin now without failing."""
        for job in by_job(keys):
            if not self.jobs[job].started:
                self._start(self.jobs[job])
        return self._under_way(keys)

    def _under_way(self, keys: Sequence[ImageKey]) -> list[ImageKey]:
        """Without the images of jobs that have ended or that are to begin again."""
        return [key for key in keys if key.job in self.jobs and self.jobs[key.job].started]

    def _start(self, progress: Progress) -> None:
        job, progress.started = progress.job, True
        if not progress.told:
            progress.told, progress.begun = True, self.clock()
            self.emit(Started(job.id, progress.units * progress.shape.evaluations))
        try:
            progress.warnings = self.runner.start(job, progress.precise)
        except Exception as error:
            self._note(error, "start")
            self._fail(job.id, error)

    def _report(self) -> None:
        """Tell where the waiting jobs stand: soon after one came, else at most every TELL_SECONDS."""
        now = self.clock()
        if self.waiting and now >= self.next_report:
            self.next_report = now + TELL_SECONDS
            if places := self._places():
                self.emit(QueuePositions(places))

    def _places(self) -> tuple[QueuePosition, ...]:
        """As in QueuePositions; who is at the door comes after all that are in."""
        queued = [(p.job, p.ahead + p.own) for p in self.scheduler.queue() if not self.jobs[p.job].told]
        work = self.scheduler.work
        for job in self.door:
            progress = self.jobs[job]
            shape = progress.shape
            work += progress.units * progress.job.rows * shape.evaluations * shape.row_cost
            queued.append((job, work))
        return tuple(
            QueuePosition(job, place, self._seconds(work)) for place, (job, work) in enumerate(queued, 1)
        )

    def _seconds(self, work: float) -> float | None:
        return None if self.pace is None else work * self.pace

    def _step(self, keys: list[ImageKey]) -> None:
        """Step all; what fails is tried in parts, down to one job or, for want of memory, one image."""
        try:
            self._call(keys)
            return
        except OutOfMemory as error:
            self._note(error, "step")
            parts, failure = self._halves(keys), error
        except Exception as error:
            parts, failure = list(by_job(keys).values()), error
        if len(parts) == 1:
            self._fail(keys[0].job, failure)
            return
        log.warning("a call of %d images failed (%s); trying parts", len(keys), type(failure).__name__)
        del failure  # and with it whatever its frames hold on the device
        for part in parts:
            if left := self._under_way(part):  # an earlier part may have ended a job of this one
                self._step(left)

    def _halves(self, keys: list[ImageKey]) -> list[list[ImageKey]]:
        """Two, and smaller calls of the group from now on; all in one where it is a single image."""
        if len(keys) == 1:
            return [keys]
        group = self.jobs[keys[0].job].shape.group
        self.limits.failed(group, self._rows(keys))
        self._limit(group)
        middle = len(keys) // 2
        return [keys[:middle], keys[middle:]]

    def _rows(self, keys: Sequence[ImageKey]) -> int:
        return sum(self.jobs[key.job].job.rows for key in keys)

    def _call(self, keys: list[ImageKey]) -> None:
        """One UNet call, counted and told. Raises as the runner does."""
        begin = self.clock()
        call = self.runner.step(keys)
        seconds = self.clock() - begin
        self._learn(keys, call, seconds)
        fine = [key for key in keys if key.job not in call.broken]
        shown = [key for key in fine if self._count(key)]
        self._advance(fine)
        jobs = tuple(JobSteps(job, sum(self.jobs[job].furthest.values())) for job in by_job(keys))
        running = len(self.jobs) - self.waiting
        self.emit(Stepped(self._rows(keys), call.rows, len(keys), seconds, running, self.waiting, jobs))
        self._mend(call.broken)
        for key in self._under_way(shown):
            self._preview(key)

    def _mend(self, broken: Sequence[str]) -> None:
        """Run jobs again whose numbers are none."""
        for job in broken:
            self.emit(Incident("non_finite", "step"))
            self._again(self.jobs[job])

    def _learn(self, keys: list[ImageKey], call: Call, seconds: float) -> None:
        """How fast the device is, and how many rows of the group it holds."""
        shape = self.jobs[keys[0].job].shape
        self.limits.passed(shape.group, call.use)
        before, self.last = self.last, Timed(shape, self._rows(keys), call.rows)
        if not call.late:
            self._pace(self.last, seconds)
        elif before and call.seconds is not None:
            self._pace(before, call.seconds)
        self._limit(shape.group)

    def _pace(self, timed: Timed, seconds: float) -> None:
        pace = seconds / (timed.rows * timed.shape.row_cost)
        self.pace = pace if self.pace is None else self.pace + MEMORY * (pace - self.pace)
        self._time(timed.shape.group, seconds / timed.padded)

    def _time(self, group: Hashable, seconds: float) -> None:
        """What a row took; a group's first call, which may prepare things, does not count."""
        before = self.row_seconds.get(group)
        if before:
            seconds = before + MEMORY * (seconds - before)
        self.row_seconds[group] = 0.0 if before is None else seconds

    def _count(self, key: ImageKey) -> bool:
        """Count a step of an image; returns whether it is to be shown now."""
        progress = self.jobs[key.job]
        news, every = progress.count(key.index), progress.job.preview_every
        step = progress.steps[key.index]
        return news and bool(every) and step % every == 0 and step < progress.shape.evaluations

    def _preview(self, key: ImageKey) -> None:
        """Show an image, in D's time; one that cannot be shown runs on."""
        begin = self.clock()
        try:
            preview = self.runner.preview(key)
        except Exception:
            log.warning("no preview of job %s", key.job, exc_info=True)
        else:
            self.owed -= self.clock() - begin
            self.emit(Previewed(key.job, key.index, self.jobs[key.job].steps[key.index], *preview))

    def _again(self, progress: Progress) -> None:
        """Run a job again from its seed, in float32; one that did is given up."""
        job = progress.job
        if progress.precise:
            self._fail(job.id, NonFinite())
            return
        log.warning("job %s has non-finite numbers; it runs again in float32", job.id)
        self._leave(progress)
        self._drop(job.id)
        progress.precise, progress.started = True, False
        progress.steps, progress.pictures = {}, {}
        try:
            self._enter(progress)
        except Exception as error:
            self._fail(job.id, error)

    def _advance(self, keys: list[ImageKey]) -> None:
        for key in self.scheduler.advance(keys):
            self.jobs[key.job].denoised = self.clock()
            self.latents.append(key)

    def _decode_some(self, stepped: float | None) -> None:
        """Give D as long as the UNet had, which this once may be overdrawn; one picture if that had nothing.

        So running jobs go at half speed at worst while pictures wait, and pictures wait for a step or so.
        """
        self.owed += stepped or 0.0
        for count in range(self.decode_chunk):
            if not self.latents or (self.owed <= 0 and (stepped is not None or count)):
                break
            self._decode(self._next_latent())
        if not self.latents or stepped is None:
            self.owed = 0.0

    def _next_latent(self) -> ImageKey:
        """By turns the one that has waited longest, and one of the smallest job."""
        self.decoded += 1
        if self.decoded % 2:
            key = min(self.latents, key=lambda key: self.jobs[key.job].units)
            self.latents.remove(key)
            return key
        return self.latents.popleft()

    def _decode(self, key: ImageKey) -> None:
        progress = self.jobs[key.job]
        try:
            progress.pictures[key.index] = self._picture(key)
        except Exception as error:
            self._note(error, "decode")
            self._fail(key.job, error)
        else:
            if len(progress.pictures) == progress.units:
                self._finish(progress)

    def _picture(self, key: ImageKey) -> bytes:
        """From D, its seconds counted. Raises as the runner does."""
        begin = self.clock()
        try:
            return self.runner.finish(key)
        finally:
            seconds = self.clock() - begin
            self.owed -= seconds
            self.emit(Decoded(seconds))

    def _finish(self, progress: Progress) -> None:
        job = progress.job
        self._forget(job.id)
        self.emit(
            Done(
                job.id,
                images=tuple(progress.pictures[index] for index in range(progress.units)),
                warnings=progress.warnings,
                queue=progress.begun - progress.received,
                denoise=progress.denoised - progress.begun,
                decode=self.clock() - progress.denoised,
            )
        )

    def _note(self, error: Exception, stage: Stage) -> None:
        """Tell of an error that operators count."""
        if isinstance(error, OutOfMemory | NonFinite):
            kind: IncidentKind = "out_of_memory" if isinstance(error, OutOfMemory) else "non_finite"
            self.emit(Incident(kind, stage))

    def _fail(self, job: str, error: Exception) -> None:
        log.error("job %s failed", job, exc_info=error)
        self._forget(job)
        self.emit(Failed(job, code_of(error)))

    def _forget(self, job: str) -> None:
        self.door.pop(job, None)
        self._leave(self.jobs[job])
        self._drop(job)
        del self.jobs[job]

    def _drop(self, job: str) -> None:
        """Forget what a job has on the device and on its way to D."""
        self.latents = deque(key for key in self.latents if key.job != job)
        self.runner.discard(job)


def by_job(keys: Sequence[ImageKey]) -> dict[str, list[ImageKey]]:
    return {job: [key for key in keys if key.job == job] for job in dict.fromkeys(key.job for key in keys)}

"""The loop: jobs in, UNet calls and decoding in between, events out. Knows no tensors and no processes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

from service.engine.decode_queue import DecodeQueue
from service.engine.events import (
    CallEnded,
    Cancelled,
    Decoded,
    Done,
    Event,
    Failed,
    Incident,
    JobSteps,
    Loaded,
    Overflowed,
    Previewed,
    QueuePosition,
    QueuePositions,
    Stage,
    Started,
    Stepped,
    Withdrawn,
)
from service.engine.job import ImageKey, Job, ModelKey, Segment, WeightsKey
from service.engine.job_run import JobRun
from service.engine.model_calls import ModelCall
from service.engine.row_limits import RowLimits
from service.engine.runner import Call, Runner
from service.engine.scheduler import Scheduler
from service.engine.speed import CallSize, Speed, averaged
from service.errors import NonFinite, OutOfMemory, code_of

log = logging.getLogger(__name__)

Result = TypeVar("Result")

REPORT_SECONDS = 0.5  # between two reports of queue positions
MAX_OVERTAKING_SECONDS = 10.0  # a job whose model has no room waits this long, then later jobs wait for it
MIN_LOAD_SECONDS = 0.02  # loads that take less are not reported
MAX_CALL_SECONDS = 1.0  # calls that would take longer get fewer rows, since a new job waits for their end


class Engine:
    """Runs jobs. Every job ends with exactly one Done, Failed or Cancelled event.

    clock: seconds, from any origin.
    """

    def __init__(
        self,
        runner: Runner,
        emit: Callable[[Event], None],
        max_rows: int,
        decode_chunk: int,
        clock: Callable[[], float],
    ) -> None:
        self.runner = runner
        self.emit = emit
        self.scheduler = Scheduler(max_rows)
        self.limits = RowLimits(runner.buckets)
        self.speed = Speed()
        self.decode_chunk = decode_chunk
        self.clock = clock
        self.jobs: dict[str, JobRun] = {}
        self.pending: dict[str, None] = {}  # jobs that are not admitted, by arrival
        self.busy_models: Counter[WeightsKey] = Counter()  # number of admitted jobs of each
        self.model_calls: list[ModelCall] = []
        self.undecoded = DecodeQueue()
        self.decoding: dict[ImageKey, float] = {}  # images being decoded, and the seconds charged for them
        self.decode_seconds: float | None = None  # running average of one image
        self.next_report = 0.0

    @property
    def busy(self) -> bool:
        """Whether there are jobs, or calls about models."""
        return bool(self.jobs or self.model_calls)

    @property
    def waiting(self) -> int:
        """The number of jobs that have had no step."""
        return len(self.pending) + self.scheduler.waiting

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ValueError if one with its id is unfinished."""
        if job.id in self.jobs:
            raise ValueError(f"job {job.id} is queued already")
        self.next_report = 0.0
        try:
            self.jobs[job.id] = JobRun(job, self.clock(), self.runner.shape(job))
        except Exception as error:
            log.error("job %s failed", job.id, exc_info=error)
            self.runner.discard(job.id)
            self.emit(Failed(job.id, code_of(error)))
        else:
            self.pending[job.id] = None

    def cancel(self, job: str) -> None:
        """Stop a job, or a call about a model; one that has ended is left alone."""
        self.model_calls = [call for call in self.model_calls if call.id != job]
        if job in self.jobs:
            self._forget(job)
            self.emit(Cancelled(job))

    def withdraw(self, job: str) -> None:
        """Give a job back that has not started; any other is left alone."""
        if job in self.jobs and not self.jobs[job].announced:
            self._forget(job)
            self.emit(Withdrawn(job))

    def set_loaded(self, call: str, model: str, load: bool) -> None:
        """Load a model when there is room, or unload it when no job uses it; ends with a CallEnded event."""
        self.model_calls.append(ModelCall(call, model, load))

    def install(self, contents: Any) -> None:
        """Serve other models from now on. Jobs under way keep the models that they have."""
        self.model_calls += [ModelCall(None, model, load=False) for model in self.runner.install(contents)]

    def interrupt(self, job: str) -> None:
        """Take no more steps of a job that has started; its images are decoded as they are."""
        run = self.jobs.get(job)
        if run is None or not run.started or run.interrupted:
            return
        self.scheduler.remove(job)
        run.interrupted, run.denoised_at = True, self.clock()
        decoding = {key.image for key in self.decoding if key.job == job}
        queued = self.undecoded.images_of(job) | decoding | set(run.images)
        for image in range(run.parts):
            if image not in queued:
                self._queue_decoding(ImageKey(job, image))

    def tick(self) -> None:
        """At most one UNet call, and about as much time of decoding.

        After the call this waits only for images whose decoding began in an earlier turn: a GPU that has
        finished them still has the call to run.
        """
        self._carry_out_calls()
        self._admit_pending()
        picked = self._start_picked(self.scheduler.pick())
        self._report_positions()
        begin = self.clock()
        if picked:
            self._step(picked)
        elif self.undecoded or self.decoding:  # latents with NaN or Inf values are not decoded
            self._restart_non_finite(self.runner.settle())
        step_seconds = self.clock() - begin if picked else None
        self._take_decoded(wait=True)
        self._decode_some(step_seconds)
        if not picked:
            self._take_decoded(wait=True)

    # Calls about models.

    def _carry_out_calls(self) -> None:
        """Carry out the calls that jobs permit now."""
        waiting = []
        for call in self.model_calls:
            code = None
            try:
                done = self._load_model(call) if call.load else self._unload(call.model)
            except Exception as error:
                log.error("model %s could not be loaded", call.model, exc_info=error)
                done, code = True, code_of(error)
            if not done:
                waiting.append(call)
            elif call.id is not None:
                self.emit(CallEnded(call.id, code))
        self.model_calls = waiting

    def _load_model(self, call: ModelCall) -> bool:
        """Load a model; False if busy models leave no room for it."""
        keys = (ModelKey(call.model),)
        return self._load(call, keys, self.runner.load_models, keys)

    def _unload(self, model: str) -> bool:
        """Unload a model; False if a job uses it."""
        if any(key.model == model for run in self.jobs.values() for key in run.job.model_keys):
            return False
        self.runner.unload_model(model)
        return True

    # Admission: a job's models are loaded, then the scheduler gets the job.

    def _admit_pending(self) -> None:
        """Admit the jobs whose models are loaded or can be. No job overtakes one that has waited too long."""
        for job in list(self.pending):
            run = self.jobs[job]
            try:
                loaded = self._load(run, run.job.weights_keys, self.runner.load, run.job)
                if loaded:
                    self._admit(run)
            except Exception as error:
                self._handle(run, error, "load")
                continue
            if not loaded and self.clock() - run.received_at >= MAX_OVERTAKING_SECONDS:
                break

    def _load(
        self, waiting: JobRun | ModelCall, keys: Sequence[WeightsKey], load: Callable[..., bool], what: object
    ) -> bool:
        """Load models for a job or a call; False if busy ones leave no room. Raises OutOfMemory."""
        busy = frozenset(self.busy_models)
        if waiting.no_room_with and waiting.no_room_with <= busy:
            return False
        try:
            begin = self.clock()
            loaded = self._with_retry("load", partial(load, what, busy))
            if loaded and (seconds := self.clock() - begin) >= MIN_LOAD_SECONDS:
                model = next(key for key in keys if isinstance(key, ModelKey))
                self.emit(Loaded(model, seconds))
            return loaded
        except OutOfMemory as error:
            if not busy or busy.issuperset(keys):
                raise
            self._report_incident(error, "load")
        waiting.no_room_with = busy
        return False

    def _admit(self, run: JobRun) -> None:
        job = run.job
        # Computed again, because the length of the context may depend on the model, which is loaded by now.
        run.shape = self.runner.shape(job, run.full_precision)
        self.scheduler.admit(job.id, run.shape, run.parts, job.priority, job.client, job.share)
        self.pending.pop(job.id, None)
        run.admitted = True
        self.busy_models.update(job.weights_keys)
        for group in run.groups:
            self.limits.start_small(group)
            self._limit_rows(group)

    def _withdraw(self, run: JobRun) -> None:
        """The inverse of _admit(); a job that is not admitted is left alone."""
        job = run.job
        if not run.admitted:
            return
        run.admitted = False
        self.scheduler.remove(job.id)
        self.busy_models -= Counter(job.weights_keys)  # keys with a count of 0 are dropped

    def _limit_rows(self, group: Hashable) -> None:
        """Limit the calls of a group to what fits in memory and ends soon enough."""
        sizes = self.runner.buckets
        quick = (size for size in sizes if self.speed.call_seconds(group, size) <= MAX_CALL_SECONDS)
        rows = max(quick, default=sizes[0])
        self.scheduler.limit(group, min(self.limits.rows(group), rows))

    # The start of jobs that are picked for the first time.

    def _start_picked(self, keys: list[ImageKey]) -> list[ImageKey]:
        """Start the jobs of these images that have not started; returns the images of all that have."""
        for job in by_job(keys):
            if not self.jobs[job].started:
                self._start(self.jobs[job])
        return self._running(keys)

    def _running(self, keys: Sequence[ImageKey]) -> list[ImageKey]:
        """The images of running jobs among these: some jobs may have ended, or may have to start again."""
        return [key for key in keys if key.job in self.jobs and self.jobs[key.job].started]

    def _start(self, run: JobRun) -> None:
        job, run.started = run.job, True
        if not run.announced:
            run.announced, run.started_at = True, self.clock()
            self.emit(Started(job.id, run.parts * run.shape.evaluations))
        begin = self.clock()
        try:
            run.warnings = self._with_retry("start", partial(self.runner.start, job, run.full_precision))
            run.start_seconds = self.clock() - begin
        except Exception as error:
            self._handle(run, error, "start")

    def _report_positions(self) -> None:
        """Report the queue positions: at once after a new job, else every REPORT_SECONDS."""
        now = self.clock()
        if self.waiting and now >= self.next_report:
            self.next_report = now + REPORT_SECONDS
            if positions := self._positions():
                self.emit(QueuePositions(positions))

    def _positions(self) -> tuple[QueuePosition, ...]:
        """The jobs that have not started; pending ones come after those that are admitted."""
        queued = [(p.job, p.ahead + p.own) for p in self.scheduler.queue() if not self.jobs[p.job].announced]
        work = self.scheduler.work
        for job in self.pending:
            work += self.jobs[job].work
            queued.append((job, work))
        numbered = enumerate(queued, 1)
        return tuple(QueuePosition(job, number, self.speed.seconds(work)) for number, (job, work) in numbered)

    # UNet calls.

    def _step(self, keys: list[ImageKey]) -> None:
        """Step these images. A failed call is split: into halves if memory ran out, otherwise into jobs."""
        failure: Exception
        try:
            if len(keys) == 1:
                self._with_retry("step", partial(self._call, keys))
            else:
                self._call(keys)
            return
        except OutOfMemory as error:
            failure, parts = error, self._halves(keys)
        except Exception as error:
            failure, parts = error, list(by_job(keys).values())
        if len(parts) == 1:
            self._handle(self.jobs[keys[0].job], failure, "step")
            parts = []
        else:
            self._report_incident(failure, "step")
            log.warning("a call of %d images failed (%s); trying parts", len(keys), type(failure).__name__)
        del failure  # its traceback keeps tensors of the failed call in memory
        for part in parts:
            if remaining := self._running(part):  # a job may have failed in an earlier part
                self._step(remaining)

    def _halves(self, keys: list[ImageKey]) -> list[list[ImageKey]]:
        """Two halves of the images (a single image as it is); later calls of the group will be smaller."""
        if len(keys) == 1:
            return [keys]
        group = self._segment(keys[0]).group
        self.limits.record_failure(group, self._rows(keys))
        self._limit_rows(group)
        middle = len(keys) // 2
        return [keys[:middle], keys[middle:]]

    def _rows(self, keys: Sequence[ImageKey]) -> int:
        """Rows of the next call of these images."""
        return sum(self._segment(key).rows for key in keys)

    def _segment(self, key: ImageKey) -> Segment:
        """The segment of the image's next call."""
        return self.jobs[key.job].segment(key.image)

    def _call(self, keys: list[ImageKey]) -> None:
        """One UNet call, counted and reported. Raises as the runner does."""
        begin = self.clock()
        call = self.runner.step(keys)
        seconds = self.clock() - begin
        work = sum(self._segment(key).call_work for key in keys)
        size = CallSize(self._segment(keys[0]).group, self._rows(keys), call.rows, work)
        rows_of = {job: self._rows(own) for job, own in by_job(keys).items()}
        self._record(size, call, seconds)
        finite = [key for key in keys if key.job not in call.non_finite]
        due = [key for key in finite if self.jobs[key.job].count_step(key.image)]
        for key in self.scheduler.advance(finite):
            self.jobs[key.job].denoised_at = self.clock()
            self._queue_decoding(key)
        jobs = tuple(
            JobSteps(job, sum(self.jobs[job].most_steps.values()), rows) for job, rows in rows_of.items()
        )
        running = len(self.jobs) - self.waiting
        self.emit(Stepped(size.rows, call.rows, len(keys), seconds, running, self.waiting, jobs))
        self._restart_non_finite(call.non_finite)
        for key in self._running(due):
            self._preview(key)

    def _record(self, size: CallSize, call: Call, seconds: float) -> None:
        """Update the estimates of speed and memory, and with them the group's limit of rows."""
        group = size.group
        self.limits.record_success(group, call.memory)
        self.speed.record(size, call, seconds)
        self._limit_rows(group)

    def _preview(self, key: ImageKey) -> None:
        """Emit a preview, which counts as decoding. If that fails, the job goes on without it."""
        begin = self.clock()
        try:
            preview = self.runner.preview(key)
        except Exception:
            log.warning("no preview of job %s", key.job, exc_info=True)
        else:
            self.undecoded.charge(self.clock() - begin)
            self.emit(Previewed(key.job, key.image, self.jobs[key.job].steps[key.image], *preview))

    # Between two phases and after the last one.

    def _queue_decoding(self, key: ImageKey) -> None:
        """Queue an image whose steps, or those of a phase, are done."""
        run = self.jobs[key.job]
        self.undecoded.add(key, run.parts, run.job.client, run.job.share)

    def _decode_some(self, step_seconds: float | None) -> None:
        """Decode for about as long as the UNet call took; without a call, decode at least one image.

        The preparation of an image for its next phase counts as decoding.
        """
        self.undecoded.begin_turn(step_seconds)
        batch: list[ImageKey] = []
        for count in range(self.decode_chunk):
            if not self.undecoded.may_decode(count, step_seconds):
                break
            key = self.undecoded.pop()
            if self.jobs[key.job].is_denoised(key.image):
                batch.append(key)
                self.decoding[key] = expected = self.decode_seconds or 0.0
                self.undecoded.charge(expected)
            else:
                self._prepare(key)
            if len(batch) == self.runner.decode_batch:
                self._decode(batch)
                batch = []
        self._decode(batch)
        self.undecoded.end_turn(step_seconds)

    def _prepare(self, key: ImageKey) -> None:
        """Work on an image for its next phase, which starts when all images of the job are ready."""
        run = self.jobs[key.job]
        begin = self.clock()
        try:
            ready = self._with_retry("prepare", partial(self.runner.prepare, key))
        except Exception as error:
            self._handle(run, error, "prepare")
            return
        self.undecoded.charge(self.clock() - begin)
        if not ready:
            self._queue_decoding(key)
            return
        run.prepared.add(key.image)
        if len(run.prepared) == run.parts:
            run.prepared.clear()
            self.scheduler.proceed(key.job)

    def _decode(self, keys: list[ImageKey]) -> None:
        """Start to decode these images; if that fails, each of them alone."""
        keys = [key for key in keys if key in self.decoding]  # a job may have failed meanwhile
        if not keys:
            return
        try:
            self._with_retry("decode", partial(self.runner.decode, keys))
        except Exception as error:
            if len(keys) == 1:
                self.undecoded.charge(-self.decoding.pop(keys[0]))
                self._handle(self.jobs[keys[0].job], error, "decode")
                return
            log.warning("%d images could not be decoded together", len(keys), exc_info=True)
        else:
            self._take_decoded(wait=False)
            return
        for key in keys:
            self._decode([key])

    def _take_decoded(self, wait: bool) -> None:
        """Take the images whose decoding has ended; their jobs may be finished."""
        for key, result, seconds in self.runner.decoded(wait):
            if key not in self.decoding:  # its job has failed because of an earlier one of these images
                continue
            self.undecoded.charge(seconds - self.decoding.pop(key))
            self.decode_seconds = averaged(self.decode_seconds, seconds)
            self.emit(Decoded(seconds))
            run = self.jobs[key.job]
            if isinstance(result, Exception):
                self._handle(run, result, "decode")
                continue
            run.images[key.image] = result
            if len(run.images) == run.parts:
                self._finish(run)

    def _finish(self, run: JobRun) -> None:
        job = run.job
        self._forget(job.id)
        self.emit(
            Done(
                job.id,
                images=tuple(run.images[image] for image in range(run.parts)),
                warnings=run.warnings,
                queue=run.started_at - run.received_at,
                denoise=run.denoised_at - run.started_at,
                decode=self.clock() - run.denoised_at,
                start=run.start_seconds,
            )
        )
        if run.full_precision:
            self._count_overflow(job)

    def _count_overflow(self, job: Job) -> None:
        """Count a job that succeeded only in float32, after which its model may run in bfloat16."""
        try:
            if self.runner.count_overflow(job):
                self.emit(Overflowed(job.model))
        except OutOfMemory:
            log.warning("no memory for another copy of %s; it stays in float16", job.model)

    # Failures.

    def _with_retry(self, stage: Stage, call: Callable[[], Result]) -> Result:
        """Call the runner; if memory runs out, free what can be freed and call once more."""
        try:
            return call()
        except OutOfMemory as error:
            self._report_incident(error, stage)
        log.warning("out of memory (%s); freeing memory and trying once more", stage)
        self.runner.make_room(frozenset(self.busy_models))
        return call()

    def _handle(self, run: JobRun, error: Exception, stage: Stage) -> None:
        """Run a job again in float32 if it had NaN or Inf values; after any other error it has failed."""
        self._report_incident(error, stage)
        if isinstance(error, NonFinite) and not run.full_precision:
            self._retry_in_float32(run)
        else:
            self._fail(run.job.id, error)

    def _report_incident(self, error: Exception, stage: Stage) -> None:
        """Emit an event for an error that operators count."""
        if isinstance(error, OutOfMemory):
            self.emit(Incident("out_of_memory", stage))
        elif isinstance(error, NonFinite):
            self.emit(Incident("non_finite", stage))

    def _restart_non_finite(self, jobs: Sequence[str]) -> None:
        """Handle NaN or Inf values that were found after a step."""
        for job in jobs:
            self._handle(self.jobs[job], NonFinite(), "step")

    def _retry_in_float32(self, run: JobRun) -> None:
        """Run a job again from its seed."""
        log.warning("job %s has NaN or Inf values; it runs again in float32", run.job.id)
        was_admitted = run.admitted
        self._withdraw(run)
        self._drop(run.job.id)
        run.full_precision = True
        run.start_over()
        if was_admitted:  # otherwise it is still pending
            try:
                self._admit(run)
            except Exception as error:
                self._fail(run.job.id, error)

    def _fail(self, job: str, error: Exception) -> None:
        log.error("job %s failed", job, exc_info=error)
        self._forget(job)
        self.emit(Failed(job, code_of(error)))

    def _forget(self, job: str) -> None:
        self.pending.pop(job, None)
        self._withdraw(self.jobs[job])
        self._drop(job)
        del self.jobs[job]

    def _drop(self, job: str) -> None:
        """Forget a job's latents."""
        self.undecoded.discard(job)
        self.decoding = {key: seconds for key, seconds in self.decoding.items() if key.job != job}
        self.runner.discard(job)


def by_job(keys: Sequence[ImageKey]) -> dict[str, list[ImageKey]]:
    """The images of each job."""
    return {job: [key for key in keys if key.job == job] for job in dict.fromkeys(key.job for key in keys)}

"""Jobs, which every API call runs through: started, watched, cancelled, and kept for a while if wanted."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from service.engine.job import LatentFill
from service.errors import (
    ClientGone,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    ServiceError,
    code_of,
    to_body,
)
from service.requests import response
from service.requests.resolve import OutputFormat, resolve
from service.requests.resolved_request import NO_PREVIEWS, Previews, ResolvedRequest
from service.requests.response import Answer, Result, timings_of
from service.requests.schemas import (
    AnyJob,
    AnyRequest,
    ErrorDetail,
    GenerateRequest,
    InpaintRequest,
    JobPreview,
    JobStatus,
    SceneJob,
    UpscaleRequest,
)
from service.worker.progress import Progress, Stage, State
from service.worker.supervisor import Supervisor

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
KEEP_ALIVE_SECONDS = 15.0  # after so much silence an event stream sends a comment, or a proxy may hang up


Task = Literal["generate", "inpaint", "upscale"]
TASK_OF_REQUEST: dict[type[AnyRequest], Task] = {
    GenerateRequest: "generate",
    InpaintRequest: "inpaint",
    UpscaleRequest: "upscale",
}


@dataclass(frozen=True)
class Submission:
    """A request to run. output: a file format that was chosen outside the request.

    encode: makes the file of image `index` from the finished pixels; it runs off the event loop. warnings:
    for the client, beside those of the request itself. latent_fill: as in Job.
    """

    request: AnyRequest
    output: OutputFormat | None = None
    previews: Previews = NO_PREVIEWS
    encode: Callable[[Result, int], bytes] = response.encode_image
    warnings: tuple[str, ...] = ()
    latent_fill: LatentFill = "image"


class JobEvent(NamedTuple):
    """An event of a job's stream. number: of the job's state; never smaller than that of an earlier event."""

    number: int
    name: str
    data: JobStatus | JobPreview


@dataclass(eq=False)
class Record:
    """One job. resolved: without its input images; work: ends with the answer."""

    resolved: ResolvedRequest
    task: Task
    request_id: str
    progress: Progress
    work: asyncio.Task[Answer]
    kept: bool = False  # it can be found for a while after its end
    key: Hashable = None  # of submit()
    awaited: bool = False  # run() raises its error, to somebody who counts it
    created: float = field(default_factory=time.time)
    fetched: bool = False  # its end was read

    @property
    def id(self) -> str:
        return self.resolved.id

    @property
    def status(self) -> Stage:
        """A job runs until its files are encoded, which is after the worker is done with it."""
        if self.work.cancelled():
            return "cancelled"
        if self.work.done():
            return "failed" if self.work.exception() else "done"
        stage = self.progress.state.stage
        return "queued" if stage == "queued" else "running"

    @property
    def bytes(self) -> int:
        """The size of its files, once they are encoded."""
        return sum(map(len, self.work.result().files)) if self.status == "done" else 0

    @property
    def error(self) -> ServiceError | None:
        """The error that it failed with."""
        error = self.work.exception() if self.status == "failed" else None
        return error if error is None or isinstance(error, ServiceError) else ServiceError()

    async def cancel(self) -> None:
        """Cancel the job, queued or running; a job that has ended stays as it is."""
        self.work.cancel()
        await asyncio.wait({self.work})

    async def describe(self) -> JobStatus:
        """Where the job stands, with the images once it is done."""
        state, status = self.progress.state, self.status
        self.fetched = self.fetched or self.work.done()
        return JobStatus(
            id=self.id,
            task=self.task,
            status=status,
            created=int(self.created),
            position=state.position,
            estimate=state.estimate,
            step=state.step,
            steps=state.steps,
            result=await self.work.result().as_json() if status == "done" else None,
            error=ErrorDetail(**to_body(self.error, self.request_id)["error"]) if self.error else None,
        )

    async def events(self, seen: int | None = None) -> AsyncIterator[JobEvent | None]:
        """The events from the current state to the end; None after a while of silence.

        seen: number of the last event that the reader received; the current state is left out if it is that.
        """
        current = self.progress.state
        shown = current if current.number == seen else None
        async for state in self._states(shown):
            if state is None:
                yield None
                continue
            if state.preview and (shown is None or state.preview is not shown.preview):
                preview = await asyncio.to_thread(response.to_job_preview, self.resolved, state.preview)
                yield JobEvent(state.number, "preview", preview)
            changed = shown is None or replace(state, preview=shown.preview) != shown
            if changed and not self.work.done():  # else the final event, below, says it
                name = "step" if self.status == "running" else "queued"
                yield JobEvent(state.number, name, await self.describe())
            shown = state
        await asyncio.wait({self.work})
        yield JobEvent(self.progress.state.number, self.status, await self.describe())

    async def _states(self, state: State | None) -> AsyncIterator[State | None]:
        """The states after `state` to the end, with None after each KEEP_ALIVE_SECONDS of silence."""
        while state is None or not state.ended:
            try:
                state = await asyncio.wait_for(self.progress.after(state), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield None
            else:
                yield state


@dataclass(frozen=True)
class IdempotencyEntry:
    """What an Idempotency-Key stands for: the digest of a body, and the job that it started."""

    digest: bytes
    record: asyncio.Future[Record]


class Jobs:
    """All jobs: open ones, at most as many as the queue has places, and ended ones that are still kept."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self._records: dict[str, Record] = {}
        self._ended: dict[str, Hashable] = {}  # id -> key of submit(), in the order in which they ended
        self._keys: dict[Hashable, IdempotencyEntry] = {}
        self._bytes = 0  # of the files of all that ended

    async def wait_until_fetched(self, seconds: float) -> None:
        """Wait until every open job has ended and its end was read, or `seconds` after the last one ended."""
        open_now = [record for record in self._records.values() if not record.work.done()]
        if open_now:
            await asyncio.wait({record.work for record in open_now})
        end = time.monotonic() + seconds
        while time.monotonic() < end and not all(record.fetched for record in open_now):
            await asyncio.sleep(POLL_SECONDS)

    def find(self, job_id: str) -> Record:
        """The record of a job. Raises NotFound."""
        if job_id not in self._records:
            raise NotFound("there is no such job; jobs are kept for a limited time after their end")
        return self._records[job_id]

    async def run(self, prepare: Callable[[], Submission], request_id: str) -> Answer:
        """Start a job and wait for its answer. Cancelling this coroutine cancels the job.

        Raises as start(), and ClientGone when somebody else cancelled the job.
        """
        record = await self.start(prepare, request_id)
        record.awaited = True
        try:
            await asyncio.wait({record.work})
            if record.work.cancelled():
                raise ClientGone("the job was cancelled")
            return record.work.result()
        finally:
            record.work.cancel()

    async def start(
        self,
        prepare: Callable[[], Submission],
        request_id: str,
        kept: bool = False,
        key: Hashable = None,
    ) -> Record:
        """Reserve a place in the queue, resolve the request in a thread, and start its job.

        prepare: makes the submission, in that thread; it may decode images. The place is held until the
        files are encoded; the deadline counts from here. kept: the job can be found for a while after its
        end. Raises ServiceError; a request that is refused leaves nothing behind.
        """
        begin, service = time.monotonic(), self.supervisor
        with ExitStack() as slot:
            slot.enter_context(service.reserve_slot())
            submission, resolved = await asyncio.to_thread(self._resolve, prepare)
            seconds = submission.request.timeout or service.settings.timeout
            progress = Progress()
            coroutine = self._work(resolved, submission.encode, progress, begin, begin + seconds)
            work = asyncio.create_task(coroutine)
            task = TASK_OF_REQUEST[type(submission.request)]
            record = Record(resolved.without_inputs(), task, request_id, progress, work, kept, key)
            self._records[record.id] = record
            held = slot.pop_all()  # not in the task: one that is cancelled at once never begins
            work.add_done_callback(lambda _: self._end(record, held))
            return record

    def _resolve(self, prepare: Callable[[], Submission]) -> tuple[Submission, ResolvedRequest]:
        submission, service = prepare(), self.supervisor
        request, output, previews = submission.request, submission.output, submission.previews
        resolved = resolve(request, service.specs, service.settings, output, previews)
        warnings = submission.warnings + resolved.warnings
        return submission, replace(resolved, warnings=warnings, latent_fill=submission.latent_fill)

    async def _work(
        self,
        resolved: ResolvedRequest,
        encode: Callable[[Result, int], bytes],
        progress: Progress,
        begin: float,
        deadline: float,
    ) -> Answer:
        """Run the job, then encode its images, one at a time and off the event loop."""
        job, resolved = resolved.to_job(), resolved.without_inputs()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                done = await self.supervisor.run(job, progress)
                result = Result(resolved, done)
                files = [await asyncio.to_thread(encode, result, index) for index in range(job.n)]
        except TimeoutError:
            raise DeadlineExceeded from None
        timings = timings_of(done, time.monotonic() - begin)
        self.supervisor.metrics.answered(job.n, timings)
        return Answer(resolved, tuple(files), resolved.warnings + done.warnings, timings, int(time.time()))

    async def submit(self, body: AnyJob, key: Hashable, request_id: str) -> Record:
        """A new job that is kept, or the one that the key (Idempotency-Key and sender, or None) started.

        Raises as start(), with fields named as in the body.
        """
        if key is None:
            return await self._start_kept(body, None, request_id)
        digest = await asyncio.to_thread(digest_of, body)
        if key not in self._keys:  # no await between this and the assignment: a twin request finds the entry
            starting = asyncio.ensure_future(self._start_kept(body, key, request_id))
            self._keys[key] = IdempotencyEntry(digest, starting)
        known = self._keys[key]
        if known.digest != digest:
            param = "Idempotency-Key"
            raise InvalidRequest(f"{param} was already used with another body", param=param)
        return await asyncio.shield(known.record)

    async def _start_kept(self, body: AnyJob, key: Hashable, request_id: str) -> Record:
        try:
            return await self.start(lambda: submission_of(body), request_id, kept=True, key=key)
        except ServiceError as error:
            self._keys.pop(key, None)
            raise error.within("request") from None
        except BaseException:
            self._keys.pop(key, None)
            raise

    def _end(self, record: Record, slot: ExitStack) -> None:
        """Give the place back, and keep the record for a while if it is to be kept."""
        slot.close()
        record.progress.end(record.status)
        if record.error and not record.awaited:
            self.supervisor.metrics.rejected.labels(code_of(record.error)).inc()
            log.info("job %s failed", record.id, exc_info=record.work.exception())
        if not record.kept:
            record.fetched = True
            del self._records[record.id]
            return
        settings = self.supervisor.settings
        self._ended[record.id] = record.key
        self._bytes += record.bytes
        while len(self._ended) > settings.jobs_kept or (
            self._bytes > settings.jobs_bytes and len(self._ended) > 1
        ):
            self._forget(next(iter(self._ended)))
        asyncio.get_running_loop().call_later(settings.jobs_seconds, self._forget, record.id)

    def _forget(self, job_id: str) -> None:
        if job_id in self._ended:
            self._bytes -= self._records.pop(job_id).bytes
            self._keys.pop(self._ended.pop(job_id), None)


def submission_of(body: AnyJob) -> Submission:
    if not isinstance(body, SceneJob):
        return Submission(body.request)
    previews = Previews(body.preview_every, body.preview_decoded, body.preview_format)
    return Submission(body.request, previews=previews)


def digest_of(body: AnyJob) -> bytes:
    """Equal for equal bodies, whatever the order of their fields."""
    return hashlib.sha256(body.model_dump_json(exclude_unset=True).encode()).digest()

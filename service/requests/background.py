"""The jobs of all APIs: starts, watches and cancels them, and keeps background jobs after their end."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

from PIL import Image

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
from service.requests.job_schemas import AnyJob, JobPreview, JobStatus, SceneJob
from service.requests.resolve import OutputFormat, resolve
from service.requests.resolved_request import NO_PREVIEWS, Previews, ResolvedRequest
from service.requests.response import Answer, Result, timings_of
from service.requests.response_schemas import ErrorDetail
from service.requests.schemas import AnyRequest, GenerateRequest, InpaintRequest, UpscaleRequest
from service.requests.signing import Signer
from service.tracing import NoTracing, Tracing
from service.worker.backend import Backend
from service.worker.progress import Progress, Stage, State

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # between two checks whether ended jobs were fetched
KEEP_ALIVE_SECONDS = (
    15.0  # without an event, after which a stream sends a comment: proxies close idle connections
)


Task = Literal["generate", "inpaint", "upscale"]
TASK_OF_REQUEST: dict[type[AnyRequest], Task] = {
    GenerateRequest: "generate",
    InpaintRequest: "inpaint",
    UpscaleRequest: "upscale",
}


@dataclass(frozen=True)
class Submission:
    """A request to run. output: a file format that takes precedence over the request's own.

    encode: makes the file of image `index` from the result, in a thread. warnings: for the client, in
    addition to those of the resolved request. soft_mask: as for resolve().
    """

    request: AnyRequest
    output: OutputFormat | None = None
    previews: Previews = NO_PREVIEWS
    encode: Callable[[Result, int], bytes] = response.encode_image
    warnings: tuple[str, ...] = ()
    soft_mask: Image.Image | None = None


class JobEvent(NamedTuple):
    """An event of a job's stream. number: of the job's state; never smaller than that of an earlier event."""

    number: int
    name: str
    data: JobStatus | JobPreview


class JobView(Protocol):
    """A job as its clients see it, in this process or in another one."""

    @property
    def id(self) -> str: ...

    async def describe(self) -> JobStatus:
        """The newest state of the job; once it is done, with the images."""

    def events(self, seen: int | None = None) -> AsyncIterator[JobEvent | None]:
        """As Record.events()."""

    async def cancel(self) -> None:
        """Cancel the job, queued or running; a job that has ended stays as it is."""


class JobBoard(Protocol):
    """Starts and finds the jobs of POST /jobs: Jobs, or cluster.shared_jobs."""

    async def submit(self, body: AnyJob, key: Hashable, request_id: str) -> JobView:
        """As Jobs.submit()."""

    async def find(self, job_id: str) -> JobView:
        """A job that is open or kept. Raises NotFound."""


@dataclass(eq=False)
class Record:
    """One job. resolved: without its input images; work: the task that returns the answer."""

    resolved: ResolvedRequest
    task: Task
    request_id: str
    progress: Progress
    work: asyncio.Task[Answer]
    kept: bool = False  # the job can be found for a while after its end
    key: Hashable = None  # idempotency key; see submit()
    awaited: bool = False  # run() raises the job's error, and its caller counts it
    created: float = field(default_factory=time.time)
    fetched: bool = False  # a client has read the final state

    @property
    def id(self) -> str:
        return self.resolved.id

    @property
    def status(self) -> Stage:
        """The job's stage. It is running until its files are encoded, which is later than in the worker."""
        return self._stage_at(self.progress.state)

    def _stage_at(self, state: State) -> Stage:
        """The stage that clients see: that of `state`, or, after the end of the job, how it ended."""
        if self.work.cancelled():
            return "cancelled"
        if self.work.done():
            return "failed" if self.work.exception() else "done"
        return "queued" if state.stage == "queued" else "running"

    @property
    def bytes(self) -> int:
        """The size of the job's files; 0 before they are encoded."""
        return sum(map(len, self.work.result().files)) if self.status == "done" else 0

    @property
    def error(self) -> ServiceError | None:
        """The error that the job failed with, if it did."""
        error = self.work.exception() if self.status == "failed" else None
        return error if error is None or isinstance(error, ServiceError) else ServiceError()

    async def cancel(self) -> None:
        """Cancel the job, queued or running; a job that has ended stays as it is."""
        self.work.cancel()
        await asyncio.wait({self.work})

    async def describe(self, state: State | None = None) -> JobStatus:
        """The newest state of the job, or an earlier one; once it is done, with the images."""
        state = state or self.progress.state
        status = self._stage_at(state)
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
            if changed and not self.work.done():  # otherwise the final event follows below
                name = "step" if self._stage_at(state) == "running" else "queued"
                yield JobEvent(state.number, name, await self.describe(state))
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
    """The use of an Idempotency-Key: the digest of the request body, and the job that it started."""

    digest: bytes
    record: asyncio.Future[Record]


class Jobs:
    """All open jobs (at most one per slot of the queue), and ended jobs that are kept."""

    def __init__(
        self, supervisor: Backend, signer: Signer | None = None, tracing: Tracing | None = None
    ) -> None:
        """signer: signs the files of all jobs; None: files are not signed. tracing: None for no traces."""
        self.supervisor = supervisor
        self.signer = signer
        self.tracing = tracing or NoTracing()
        self._records: dict[str, Record] = {}
        self._ended: dict[str, Hashable] = {}  # kept jobs in the order of their ends: id -> idempotency key
        self._keys: dict[Hashable, IdempotencyEntry] = {}
        self._bytes = 0  # of the files of kept jobs

    async def wait_until_fetched(self, seconds: float) -> None:
        """Wait until every open job has ended and been fetched, or `seconds` after the last one has ended."""
        open_now = [record for record in self._records.values() if not record.work.done()]
        if open_now:
            await asyncio.wait({record.work for record in open_now})
        end = time.monotonic() + seconds
        while time.monotonic() < end and not all(record.fetched for record in open_now):
            await asyncio.sleep(POLL_SECONDS)

    async def find(self, job_id: str) -> Record:
        """The record of a job. Raises NotFound."""
        if job_id not in self._records:
            raise NotFound("there is no such job; jobs are kept for a limited time after their end")
        return self._records[job_id]

    async def run(self, prepare: Callable[[], Submission], request_id: str) -> Answer:
        """Start a job and wait for its answer. Cancelling this coroutine cancels the job.

        Raises the errors of start() and of the job, and ClientGone if the job was cancelled elsewhere.
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
        """Reserve a slot of the queue, resolve the request in a thread, and start its job.

        prepare: makes the submission, in that thread; it may decode images. The slot is held until the files
        are encoded. The request's timeout begins here. kept: the job can be found for a while after its end.
        Raises ServiceError; a refused request leaves no job and holds no slot.
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
            held = slot.pop_all()  # not released by the task itself, which may be cancelled before it begins
            work.add_done_callback(lambda _: self._end(record, held))
            return record

    def _resolve(self, prepare: Callable[[], Submission]) -> tuple[Submission, ResolvedRequest]:
        submission, service = prepare(), self.supervisor
        request, output, previews = submission.request, submission.output, submission.previews
        specs, settings = service.specs, service.settings
        resolved = resolve(request, specs, settings, output, previews, submission.soft_mask)
        return submission, replace(resolved, warnings=submission.warnings + resolved.warnings)

    async def _work(
        self,
        resolved: ResolvedRequest,
        encode: Callable[[Result, int], bytes],
        progress: Progress,
        begin: float,
        deadline: float,
    ) -> Answer:
        """Run the job, then encode its images, one at a time and off the event loop."""
        job = resolved.to_job()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                with self.tracing.job(job):
                    done = await self.supervisor.run(job, progress)
                    self.tracing.parts(job, done)
                result = Result(resolved, done)
                encode = response.signing(encode, self.signer)
                with self.tracing.encode(job.n):
                    files = [await asyncio.to_thread(encode, result, index) for index in range(job.n)]
        except TimeoutError:
            raise DeadlineExceeded from None
        timings = timings_of(done, time.monotonic() - begin)
        self.supervisor.metrics.answered(job.n, timings)
        warnings, resolved = resolved.warnings + done.warnings, resolved.without_inputs()
        return Answer(resolved, tuple(files), warnings, timings, int(time.time()))

    async def submit(self, body: AnyJob, key: Hashable, request_id: str) -> Record:
        """A new background job, or the job that an earlier request with the same key has started.

        key: the Idempotency-Key together with its sender, or None. Raises the errors of start(), with fields
        named as in `body`.
        """
        if key is None:
            return await self._start_kept(body, None, request_id)
        digest = await asyncio.to_thread(digest_of, body)
        if (
            key not in self._keys
        ):  # no await until the assignment, so that a simultaneous repetition finds the entry
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
        """Release the slot, and forget the job unless it is kept."""
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
            self.forget(next(iter(self._ended)))
        asyncio.get_running_loop().call_later(settings.jobs_seconds, self.forget, record.id)

    def forget(self, job_id: str) -> None:
        """Keep a job no longer; one that has not ended is left alone."""
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

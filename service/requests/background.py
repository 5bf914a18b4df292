"""Jobs that no request waits for: begun, watched, cancelled, and kept for a while when they have ended."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from service.errors import DeadlineExceeded, InvalidRequest, NotFound, ServiceError, code_of, to_body
from service.requests import resolve, response
from service.requests.resolve import Order
from service.requests.response import Answer
from service.requests.schemas import AnyJob, ErrorDetail, JobPreview, JobStatus, SceneJob
from service.worker.progress import Progress, Stage, State
from service.worker.supervisor import Supervisor

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
KEEP_ALIVE_SECONDS = 15.0  # of silence, after which something is sent, lest a proxy hang up


@dataclass(eq=False)
class Record:
    """One job of POST /jobs. work: ends with the answer; order: without its pictures."""

    order: Order
    task: str
    request_id: str
    progress: Progress
    work: asyncio.Task[Answer]
    created: float = field(default_factory=time.time)
    collected: bool = False  # somebody has asked for it since it ended

    @property
    def id(self) -> str:
        return self.order.job.id

    @property
    def status(self) -> Stage:
        """It runs until its files are there, which is after the worker is done with it."""
        if self.work.cancelled():
            return "cancelled"
        if self.work.done():
            return "failed" if self.work.exception() else "done"
        stage = self.progress.state.stage
        return "queued" if stage == "queued" else "running"

    @property
    def bytes(self) -> int:
        """Of its files, once they are there."""
        return sum(map(len, self.work.result().files)) if self.status == "done" else 0

    @property
    def error(self) -> ServiceError | None:
        """What it failed with."""
        error = self.work.exception() if self.status == "failed" else None
        return error if error is None or isinstance(error, ServiceError) else ServiceError()

    async def cancel(self) -> None:
        """Give it up, wherever it is; one that has ended stays as it is."""
        self.work.cancel()
        await asyncio.wait({self.work})

    async def describe(self) -> JobStatus:
        """Where it stands, with the pictures once it is done."""
        state, status = self.progress.state, self.status
        self.collected = self.collected or self.work.done()
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

    async def events(self) -> AsyncIterator[tuple[str, JobStatus | JobPreview] | None]:
        """(name, what there is to say), from the state of now to the end; None after a while of silence."""
        shown: State | None = None
        async for state in self._states():
            if state is None:
                yield None
                continue
            if state.preview and (shown is None or state.preview is not shown.preview):
                yield "preview", await asyncio.to_thread(response.preview_of, self.order, state.preview)
            news = shown is None or replace(state, preview=shown.preview) != shown
            if news and not self.work.done():  # else the end, below, is the news
                yield "step" if self.status == "running" else "queued", await self.describe()
            shown = state
        await asyncio.wait({self.work})
        yield self.status, await self.describe()

    async def _states(self) -> AsyncIterator[State | None]:
        """As Progress.watch(), with None for every while of silence."""
        state: State | None = None
        while state is None or not state.ended:
            try:
                state = await asyncio.wait_for(self.progress.after(state), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield None
            else:
                yield state


@dataclass(frozen=True)
class Keyed:
    """What an Idempotency-Key stands for: the digest of a body, and the job that it began."""

    digest: bytes
    record: asyncio.Future[Record]


class Jobs:
    """All records: those under way, as many as the queue has places, and those that ended not long ago."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self._records: dict[str, Record] = {}
        self._ended: dict[str, Hashable] = {}  # id -> key of submit(), in the order in which they ended
        self._keys: dict[Hashable, Keyed] = {}
        self._bytes = 0  # of all that ended

    async def collected(self, seconds: float) -> None:
        """Wait for who asked for the jobs of now to learn how they ended, at most so long after all have."""
        open_now = [record for record in self._records.values() if not record.work.done()]
        if open_now:
            await asyncio.wait({record.work for record in open_now})
        end = time.monotonic() + seconds
        while time.monotonic() < end and not all(record.collected for record in open_now):
            await asyncio.sleep(POLL_SECONDS)

    def find(self, job_id: str) -> Record:
        """The record of a job. Raises NotFound."""
        if job_id not in self._records:
            raise NotFound("there is no such job; it may have ended long ago")
        return self._records[job_id]

    async def follow(self, body: AnyJob, request_id: str) -> Record:
        """A new job that nobody asks for by its id: forgotten as soon as it ends. Raises as submit()."""
        return await self._begin(body, None, request_id, kept=False)

    async def submit(self, body: AnyJob, key: Hashable, request_id: str) -> Record:
        """A new job, or the one that the key (its Idempotency-Key and its sender, or None) began.

        Raises as intake and Supervisor.reserve_slot() do.
        """
        if key is None:
            return await self._begin(body, None, request_id)
        digest = await asyncio.to_thread(digest_of, body)
        if key not in self._keys:  # nothing is awaited from here until it is: twins find it
            self._keys[key] = Keyed(digest, asyncio.ensure_future(self._begin(body, key, request_id)))
        known = self._keys[key]
        if known.digest != digest:
            param = "Idempotency-Key"
            raise InvalidRequest(
                f"{param} must be new for a new body; this one began another job", param=param
            )
        return await asyncio.shield(known.record)

    async def _begin(self, body: AnyJob, key: Hashable, request_id: str, kept: bool = True) -> Record:
        """Take a place, then the pictures, then begin; a request that is refused leaves nothing behind."""
        begin, service = time.monotonic(), self.supervisor
        try:
            with ExitStack() as place:
                place.enter_context(service.reserve_slot())
                order = await asyncio.to_thread(to_order, body, service, kept)
                previews = body.model_dump(include={"preview_every", "preview_decoded"})
                order = replace(order, job=replace(order.job, **previews))
                if isinstance(body, SceneJob):
                    order = replace(order, preview_format=body.preview_format)
                seconds = body.request.timeout or service.settings.timeout
                progress = Progress()
                work = asyncio.create_task(self._work(order, progress, begin, seconds))
                record = Record(order.without_pictures(), body.task, request_id, progress, work)
                self._records[record.id] = record
                held = place.pop_all()  # not in the task itself: one cancelled at once never begins
                work.add_done_callback(lambda _: self._end(record, key, held, kept))
                return record
        except BaseException:
            self._keys.pop(key, None)
            raise

    async def _work(self, order: Order, progress: Progress, begin: float, seconds: float) -> Answer:
        try:
            async with asyncio.timeout(begin + seconds - time.monotonic()):
                return await response.make(order, self.supervisor, begin, progress)
        except TimeoutError:
            raise DeadlineExceeded from None

    def _end(self, record: Record, key: Hashable, place: ExitStack, kept: bool) -> None:
        """Give the place back, and keep the record for a while if it is to be kept."""
        place.close()
        record.progress.end(record.status)
        if record.error:
            self.supervisor.metrics.rejected.labels(code_of(record.error)).inc()
            log.info("job %s failed", record.id, exc_info=record.work.exception())
        if not kept:
            record.collected = True
            del self._records[record.id]
            return
        settings = self.supervisor.settings
        self._ended[record.id] = key
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


def to_order(body: AnyJob, service: Supervisor, kept: bool) -> Order:
    """As intake.to_order, with fields named as in the body that a job to be kept came in."""
    try:
        return resolve.to_order(body.request, service.specs, service.settings)
    except ServiceError as error:
        raise (error.within("request") if kept else error) from None


def digest_of(body: AnyJob) -> bytes:
    """Equal for equal bodies, in whatever order their fields came."""
    return hashlib.sha256(body.model_dump_json(exclude_unset=True).encode()).digest()

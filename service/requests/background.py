"""The jobs of all APIs: starts, watches and cancels them, and keeps background jobs after their end."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from service.engine.job import Job
from service.errors import ClientGone, DeadlineExceeded, InvalidRequest, NotFound, ServiceError, code_of
from service.keys.client import Client
from service.keys.quotas import Caller, Quotas
from service.requests import response
from service.requests.job_record import JobView, Record
from service.requests.job_schemas import AnyJob, SceneJob, Task
from service.requests.kept import Kept
from service.requests.resolve import OutputFormat, resolve
from service.requests.resolved_request import NO_PREVIEWS, Previews, ResolvedRequest
from service.requests.response import Answer, Result, timings_of
from service.requests.schemas import AnyRequest, GenerateRequest, InpaintRequest, UpscaleRequest
from service.requests.signing import Signer
from service.requests.threads import Threads
from service.requests.webhooks.deliveries import Delivery, Webhooks
from service.requests.webhooks.targets import invalid
from service.tracing import NoTracing, Tracing
from service.worker.backend import Backend
from service.worker.progress import Progress

log = logging.getLogger(__name__)

NO_JOB = "there is no such job; jobs are kept for a limited time after their end"
POLL_SECONDS = 0.05  # between two checks whether ended jobs were fetched

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


class JobBoard(Protocol):
    """Starts and finds the jobs of POST /jobs: Jobs, or cluster.shared_jobs."""

    async def submit(self, body: AnyJob, key: Hashable, caller: Caller) -> JobView:
        """As Jobs.submit()."""

    async def find(self, job_id: str, client: Client) -> JobView:
        """A job that is open or kept and that the client may see. Raises NotFound."""


@dataclass(frozen=True)
class IdempotencyEntry:
    """The use of an Idempotency-Key: the digest of the request body, and the job that it started."""

    digest: bytes
    record: asyncio.Future[Record]


class Jobs:
    """All open jobs (at most one per slot of the queue), and ended jobs that are kept."""

    def __init__(
        self,
        supervisor: Backend,
        signer: Signer | None = None,
        tracing: Tracing | None = None,
        webhooks: Webhooks | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        """signer: signs the files of all jobs. Without it, files are not signed; the others likewise."""
        self.supervisor = supervisor
        self.signer = signer
        self.webhooks = webhooks
        self.quotas = quotas or Quotas()
        self.tracing = tracing or NoTracing()
        self._threads = Threads()
        self._records: dict[str, Record] = {}
        self._kept = Kept(supervisor.settings, self._drop)  # ids of ended jobs
        self._keys: dict[Hashable, IdempotencyEntry] = {}

    async def wait_until_fetched(self, seconds: float) -> None:
        """Wait until every open job has ended and been fetched, or `seconds` after the last one has ended."""
        open_now = [record for record in self._records.values() if not record.work.done()]
        if open_now:
            await asyncio.wait({record.work for record in open_now})
        end = time.monotonic() + seconds
        while time.monotonic() < end and not all(record.collected for record in open_now):
            await asyncio.sleep(POLL_SECONDS)

    async def finish_webhooks(self, seconds: float) -> None:
        """Wait until the webhooks of ended jobs are delivered, at most so long; then give them up."""
        if self.webhooks:
            await self.webhooks.finish(seconds)

    async def find(self, job_id: str, client: Client) -> Record:
        """The record of a job that the client may see. Raises NotFound."""
        record = self._records.get(job_id)
        if record is None or not client.may_see(record.client.id):
            raise NotFound(NO_JOB)
        return record

    async def run(self, prepare: Callable[[], Submission], caller: Caller) -> Answer:
        """Start a job and wait for its answer. Cancelling this coroutine cancels the job.

        Raises the errors of start() and of the job, and ClientGone if the job was cancelled elsewhere.
        """
        record = await self.start(prepare, caller)
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
        caller: Caller,
        kept: bool = False,
        key: Hashable = None,
        delivery: Delivery | None = None,
    ) -> Record:
        """Reserve a slot of the queue, resolve the request in a thread, and start its job.

        prepare: makes the submission, in that thread; it may decode images. The slot is held until the files
        are encoded. The request's timeout begins here. kept: the job can be found for a while after its end.
        delivery: of the job's end to its webhook.
        Raises ServiceError; a refused request leaves no job and holds no slot.
        """
        begin, service, client = time.monotonic(), self.supervisor, caller.client
        with ExitStack() as slot:
            slot.enter_context(service.reserve_slot(client))
            slot.callback(await self.quotas.begin_job(caller))
            submission, resolved = await self._threads.run(client, self._resolve, prepare)
            await self.quotas.take_images(caller, resolved.parameters.n)
            seconds = submission.request.timeout or service.settings.timeout
            progress = Progress()
            job = replace(resolved.to_job(), client=client.id, share=client.share)
            coroutine = self._work(job, client, resolved, submission.encode, progress, begin, begin + seconds)
            work = asyncio.create_task(coroutine)
            task = TASK_OF_REQUEST[type(submission.request)]
            own = (resolved.without_inputs(), task, client, caller.request_id)
            record = Record(*own, progress, work, kept, key, delivery)
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
        job: Job,
        client: Client,
        resolved: ResolvedRequest,
        encode: Callable[[Result, int], bytes],
        progress: Progress,
        begin: float,
        deadline: float,
    ) -> Answer:
        """Run the job, then encode its images, one at a time and off the event loop."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                with self.tracing.job(job):
                    done = await self.supervisor.run(job, progress)
                    self.tracing.parts(job, done)
                result = Result(resolved, done)
                encode, run = response.signing(encode, self.signer), self._threads.run
                with self.tracing.encode(job.n):
                    files = [await run(client, encode, result, index) for index in range(job.n)]
        except TimeoutError:
            raise DeadlineExceeded from None
        timings = timings_of(done, time.monotonic() - begin)
        self.supervisor.metrics.answered(job.n, timings)
        warnings, resolved = resolved.warnings + done.warnings, resolved.without_inputs()
        return Answer(resolved, tuple(files), warnings, timings, int(time.time()))

    async def submit(self, body: AnyJob, key: Hashable, caller: Caller) -> Record:
        """A new background job, or the job that an earlier request with the same key has started.

        key: the Idempotency-Key together with its sender, or None. Raises the errors of start(), with fields
        named as in `body`.
        """
        delivery = self._delivery_of(body)
        if key is None:
            return await self._start_kept(body, None, caller, delivery)
        digest = await asyncio.to_thread(digest_of, body)
        # No await until the assignment, so that a simultaneous repetition finds the entry.
        if key not in self._keys:
            starting = asyncio.ensure_future(self._start_kept(body, key, caller, delivery))
            self._keys[key] = IdempotencyEntry(digest, starting)
        known = self._keys[key]
        if known.digest != digest:
            param = "Idempotency-Key"
            raise InvalidRequest(f"{param} was already used with another body", param=param)
        return await asyncio.shield(known.record)

    async def _start_kept(
        self, body: AnyJob, key: Hashable, caller: Caller, delivery: Delivery | None
    ) -> Record:
        try:
            return await self.start(lambda: submission_of(body), caller, True, key, delivery)
        except ServiceError as error:
            self._keys.pop(key, None)
            raise error.within("request") from None
        except BaseException:
            self._keys.pop(key, None)
            raise

    def _delivery_of(self, body: AnyJob) -> Delivery | None:
        """The delivery of a job's end; None if it has no webhook. Raises InvalidRequest."""
        if body.webhook is None:
            return None
        if self.webhooks is None:
            raise invalid("is not supported by this server (setting webhook_hosts)")
        return self.webhooks.prepare(body.webhook)

    def _end(self, record: Record, slot: ExitStack) -> None:
        """Release the slot, and forget the job unless it is kept."""
        slot.close()
        record.progress.end(record.status)
        images = len(record.work.result().files) if record.status == "done" else 0
        state = record.progress.state
        self.supervisor.metrics.used(record.client.name, images, state.step, state.device_seconds)
        if record.error and not record.awaited:
            self.supervisor.metrics.rejected.labels(code_of(record.error)).inc()
            log.info("job %s failed", record.id, exc_info=record.work.exception())
        if self.webhooks and record.delivery:
            self.webhooks.start(record.delivery, record.id, record.snapshot)
        if not record.kept:
            record.fetched = True
            del self._records[record.id]
            return
        self._kept.add(record.id, record.bytes)

    def forget(self, job_id: str) -> None:
        """Keep a job no longer; one that has not ended is left alone."""
        self._kept.remove(job_id)

    def _drop(self, job_id: str) -> None:
        self._keys.pop(self._records.pop(job_id).key, None)


def submission_of(body: AnyJob) -> Submission:
    if not isinstance(body, SceneJob):
        return Submission(body.request)
    previews = Previews(body.preview_every, body.preview_decoded, body.preview_format)
    return Submission(body.request, previews=previews)


def digest_of(body: AnyJob) -> bytes:
    """Equal for equal bodies, whatever the order of their fields."""
    return hashlib.sha256(body.model_dump_json(exclude_unset=True).encode()).digest()

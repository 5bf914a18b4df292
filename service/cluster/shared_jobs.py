"""The jobs of POST /jobs when several API processes share them: each can answer for the jobs of all.

The process that accepted a job, its owner, runs it and writes its events to the store. All others read them
there. While the store is not available, new jobs are refused, and running ones go on: their ends are written
when the store is back. If the owner dies, its open jobs fail, and every process reports that.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Hashable
from contextlib import asynccontextmanager, suppress

from service.cluster.redis_store import Claim, RedisStore, Snapshot
from service.errors import InvalidRequest, JobFailed, NotFound, ServiceError, Unavailable, to_body
from service.keys.client import ANYBODY, Client
from service.keys.quotas import Caller
from service.requests.background import NO_JOB, Jobs, digest_of
from service.requests.job_record import KEEP_ALIVE_SECONDS, JobEvent, JobView, Record
from service.requests.job_schemas import AnyJob, JobPreview, JobStatus, WebhookStatus
from service.requests.response_schemas import ErrorDetail

log = logging.getLogger(__name__)

LEASE_RENEWAL_SECONDS = 5.0
RETRY_SECONDS = 0.5  # between two attempts to write a job's end
POLL_SECONDS = 1.0  # a watcher reads the job so often even if no change was announced
CLAIM_POLL_SECONDS = 0.1  # between two looks whether the first request with a key has started its job
MAX_CLAIM_SECONDS = 10.0  # a repeated request waits so long for the first one
CANCEL_SECONDS = 10.0  # the owner of a job that is to be cancelled may take so long
MAX_MISSING = 30  # times that a watched job may be missing, POLL_SECONDS apart
ENDED = ("done", "failed", "cancelled")


class SharedJobs:
    """The jobs of this process, and those of others in the store."""

    def __init__(self, jobs: Jobs, store: RedisStore) -> None:
        self.jobs = jobs
        self.store = store
        self.owner = store.owner
        self._publishing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Take part in the store while the context lasts; at the end, wait until all ends are written."""
        tasks = [asyncio.create_task(self._keep_lease()), asyncio.create_task(self._obey())]
        try:
            yield
        finally:
            if self._publishing:
                await asyncio.wait(self._publishing, timeout=LEASE_RENEWAL_SECONDS)
            for task in (*tasks, *self._publishing):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(ServiceError):
                await self.store.end_lease(self.owner)
            await self.store.close()

    async def find(self, job_id: str, client: Client) -> JobView:
        """A job of this process or of another one. Raises NotFound, and Unavailable without the store."""
        with suppress(NotFound):
            return await self.jobs.find(job_id, client)
        job = await self.store.read(job_id)
        if job is None or not client.may_see(job.client):
            raise NotFound(NO_JOB)
        return RemoteJob(job_id, self.store)

    async def submit(self, body: AnyJob, key: Hashable, caller: Caller) -> JobView:
        """As Jobs.submit(), with the keys of all processes. Raises Unavailable without the store."""
        if key is None:
            await self.store.check()
            return await self._start(body, None, caller)
        digest = (await asyncio.to_thread(digest_of, body)).hex()
        claim = Claim(key_name(key), digest, uuid.uuid4().hex)
        end = time.monotonic() + MAX_CLAIM_SECONDS
        while holder := await self.store.claim(claim):
            if holder.digest != claim.digest:
                param = "Idempotency-Key"
                raise InvalidRequest(f"{param} was already used with another body", param=param)
            if holder.job:
                return await self.find(holder.job, caller.client)
            if time.monotonic() > end:
                raise Unavailable("a request with this Idempotency-Key is being started", retry_after=5)
            await asyncio.sleep(CLAIM_POLL_SECONDS)
        try:
            return await self._start(body, claim, caller)
        except BaseException:
            self._in_background(self._release(claim))
            raise

    async def _start(self, body: AnyJob, claim: Claim | None, caller: Caller) -> Record:
        """Start a job here and write it to the store; without the store, it is cancelled again."""
        record = await self.jobs.submit(body, None, caller)
        try:
            if claim and not await self.store.confirm(claim, record.id):
                raise Unavailable("the request took too long to start", retry_after=5)
            await self._write(record, JobEvent(0, "queued", await record.describe()), claim)
        except BaseException:
            await record.cancel()
            raise
        self._in_background(self._publish(record, claim))
        return record

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _release(self, claim: Claim) -> None:
        with suppress(ServiceError):
            await self.store.release(claim)

    async def _publish(self, record: Record, claim: Claim | None) -> None:
        """Write a job's events; the last one until it is written, for as long as ended jobs are kept."""
        async for event in record.events():
            if event is not None and event.name not in ENDED:
                with suppress(Unavailable):  # the next event has all that this one has
                    await self._write(record, event, claim)
            elif event is not None:
                await self._write_end(record, event, claim)
        record.fetched = True  # by the store
        if record.delivery:
            await record.delivery.ended.wait()
            await self._write_webhook(record.id, record.delivery.describe())

    async def _write_webhook(self, job_id: str, webhook: WebhookStatus) -> None:
        """Write how a webhook has ended, as _write_end()."""
        end = time.monotonic() + self.jobs.supervisor.settings.jobs_seconds
        while time.monotonic() < end:
            try:
                return await self.store.set_webhook(job_id, webhook.model_dump_json())
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)

    async def _write_end(self, record: Record, event: JobEvent, claim: Claim | None) -> None:
        end = time.monotonic() + self.jobs.supervisor.settings.jobs_seconds
        while time.monotonic() < end:
            try:
                if not await self._write(record, event, claim):
                    self.jobs.forget(record.id)  # another process has ended it; its answer holds
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return

    async def _write(self, record: Record, event: JobEvent, claim: Claim | None) -> bool:
        """Write an event of a job to the store; False if the job has ended there."""
        data = await asyncio.to_thread(event.data.model_dump_json)
        about: dict[str, str | int] = {
            "owner": self.owner,
            "client": record.client.id,
            "request_id": record.request_id,
        }
        if isinstance(event.data, JobPreview):
            fields = about | {"preview": data, "preview_number": event.number}
            return await self.store.update(record.id, fields)
        fields = about | {"number": event.number, "name": event.name, "status": data}
        if event.name in ENDED:
            return await self.store.finish(record.id, fields, record.bytes, claim)
        return await self.store.update(record.id, fields)

    async def _keep_lease(self) -> None:
        while True:
            with suppress(Unavailable):
                await self.store.renew_lease(self.owner)
            await asyncio.sleep(LEASE_RENEWAL_SECONDS)

    async def _obey(self) -> None:
        """Cancel the jobs of this process that clients of others cancel."""
        while True:
            with suppress(Unavailable):
                async with self.store.commands(self.owner) as messages:
                    while True:
                        job = await self.store.next_message(messages, POLL_SECONDS)
                        with suppress(NotFound):
                            if job:
                                await (await self.jobs.find(job, ANYBODY)).cancel()
            await asyncio.sleep(RETRY_SECONDS)


class RemoteJob:
    """A job of another process."""

    def __init__(self, job_id: str, store: RedisStore) -> None:
        self.id = job_id
        self.store = store

    async def describe(self) -> JobStatus:
        """The newest state. Raises NotFound if the job was forgotten, and Unavailable without the store."""
        return await self._status(await self._read())

    async def cancel(self) -> None:
        """Have the owner cancel the job, and wait until it has, for a while."""
        end = time.monotonic() + CANCEL_SECONDS
        async with self.store.changes(self.id) as messages:
            while not (now := await self._read()).ended and time.monotonic() < end:
                await self.store.ask_to_cancel(self.id, now.owner)
                await self.store.next_message(messages, POLL_SECONDS)

    async def events(self, seen: int | None = None) -> AsyncIterator[JobEvent | None]:
        """As Record.events(). While the store is not available, there are only keep-alives."""
        shown, shown_preview, silence = seen, -1 if seen is None else seen, time.monotonic()
        missing = 0
        while missing < MAX_MISSING:
            try:
                async with self.store.changes(self.id) as messages:
                    while True:
                        now = await self._read()
                        if now.preview_number > shown_preview and not now.ended:
                            shown_preview, silence = now.preview_number, time.monotonic()
                            preview = JobPreview.model_validate_json(now.preview)
                            yield JobEvent(now.preview_number, "preview", preview)
                        if now.ended or shown is None or now.number > shown:
                            shown, silence = now.number, time.monotonic()
                            yield JobEvent(now.number, now.name, await self._status(now))
                        if now.ended:
                            return
                        await self.store.next_message(messages, POLL_SECONDS)
                        if time.monotonic() - silence > KEEP_ALIVE_SECONDS:
                            silence = time.monotonic()
                            yield None
            except Unavailable:
                await asyncio.sleep(POLL_SECONDS)
                yield None
            except NotFound:  # the store has lost its contents; the owner writes the job again, if it lives
                missing += 1
                await asyncio.sleep(POLL_SECONDS)
                yield None

    async def _status(self, now: Snapshot) -> JobStatus:
        """The status of an event, with the state of the webhook, which only the job's owner delivers."""
        status = JobStatus.model_validate_json(now.status)
        webhook = WebhookStatus.model_validate_json(now.webhook) if now.webhook else status.webhook
        if webhook and not now.webhook and now.ended and not await self.store.is_alive(now.owner):
            webhook = webhook.model_copy(update={"state": "failed", "last_error": "server_lost"})
        return status.model_copy(update={"webhook": webhook})

    async def _read(self) -> Snapshot:
        """The newest event. A job whose owner is gone fails here, for all processes."""
        now = await self.store.read(self.id)
        if now is None:
            raise NotFound(NO_JOB)
        if now.ended or not await self.store.is_lost(self.id, now.owner):
            return now
        log.error("job %s is lost: the process that ran it is gone", self.id, extra={"job": self.id})
        error = JobFailed("the process that ran this job ended without finishing it")
        status = JobStatus.model_validate_json(now.status).model_copy(
            update={
                "status": "failed",
                "position": None,
                "estimate": None,
                "error": ErrorDetail(**to_body(error, now.request_id)["error"]),
            }
        )
        fields: dict[str, str | int] = {"number": now.number + 1, "name": "failed"}
        await self.store.finish(self.id, fields | {"status": status.model_dump_json()}, 0, None)
        return await self.store.read(self.id) or now


def key_name(key: Hashable) -> str:
    """The Redis key of an idempotency key with its sender; neither can be read from it."""
    return "{ldm}:key:" + hashlib.sha256(repr(key).encode()).hexdigest()

"""Deliveries of webhooks: attempts with growing pauses between them, their state, and the end at shutdown."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_network
from pathlib import Path

import httpx

from service.metrics import Metrics
from service.requests.job_schemas import JobEnd, JobStatus, WebhookError, WebhookState, WebhookStatus
from service.requests.webhooks.sender import Sender
from service.requests.webhooks.targets import Rules, read_rules
from service.settings import SettingError, Settings

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0  # doubles after each attempt
MAX_PAUSE_SECONDS = 60.0
MAX_PENDING = 1000  # deliveries; further ones fail at once
MAX_PENDING_BYTES = 64 * 2**20  # of bodies; further ones are sent without images
MIN_SECRET_CHARS = 16

Describe = Callable[[], Awaitable[JobStatus]]


class Delivery:
    """The delivery of one job's end."""

    def __init__(self, url: httpx.URL) -> None:
        self.url = url
        self.state: WebhookState = "waiting"
        self.attempts = 0
        self.status: int | None = None
        self.error: WebhookError | None = None
        self.has_images = False
        self.ended = asyncio.Event()

    @property
    def sent_all(self) -> bool:
        """Whether the receiver has the job with all its images."""
        return self.state == "delivered" and self.has_images

    def describe(self) -> WebhookStatus:
        return WebhookStatus(
            state=self.state, attempts=self.attempts, last_status=self.status, last_error=self.error
        )

    def end(self, state: WebhookState, error: WebhookError | None) -> None:
        self.state, self.error = state, error
        self.ended.set()


class Webhooks:
    """The webhooks of all jobs of this process. clock and sleep are for tests."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        sender: Sender,
        rules: Rules,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.sender = sender
        self.rules = rules
        self.clock = clock
        self.sleep = sleep
        self._tasks: dict[asyncio.Task[None], tuple[Delivery, str]] = {}
        self._bytes = 0  # of the bodies of pending deliveries
        metrics.webhooks_pending.set_function(lambda: len(self._tasks))

    def prepare(self, url: str) -> Delivery:
        """The delivery for a request's `webhook`. Raises InvalidRequest."""
        return Delivery(self.rules.check(url))

    def start(self, delivery: Delivery, job: str, describe: Describe) -> None:
        """Deliver the end of a job. describe: returns its final state."""
        delivery.state = "pending"
        if len(self._tasks) >= MAX_PENDING:
            self._fail(delivery, job, "too_many")
            return
        task = asyncio.create_task(self._deliver(delivery, job, describe))
        self._tasks[task] = delivery, job
        task.add_done_callback(self._tasks.pop)

    async def finish(self, seconds: float) -> None:
        """Wait until all deliveries have ended, at most so long; those that have not then fail."""
        pending = dict(self._tasks)
        if not pending:
            return
        _, late = await asyncio.wait(pending, timeout=seconds)
        for task in late:
            task.cancel()
            self._fail(*pending[task], "shutdown")
        await asyncio.wait(pending)

    async def close(self) -> None:
        await self.finish(0)
        self.sender.close()

    async def _deliver(self, delivery: Delivery, job: str, describe: Describe) -> None:
        size = 0
        try:
            body, size = await self._body(await describe())
            self._bytes += size
            delivery.has_images = not body.images_omitted
            await self._attempt_until_delivered(delivery, job, body)
        except Exception:
            log.exception("the webhook of job %s could not be sent", job, extra={"job": job})
            self._fail(delivery, job, "internal")
        finally:
            self._bytes -= size

    async def _body(self, status: JobStatus) -> tuple[JobEnd, int]:
        """The body, and its size in bytes; without the data of images if that would be too much."""
        body = JobEnd(**dict(status), sent=0, images_omitted=False)
        size = len(await asyncio.to_thread(body.model_dump_json))
        if size <= min(self.settings.webhook_max_bytes, MAX_PENDING_BYTES - self._bytes) or not body.result:
            return body, size
        images = [image.model_copy(update={"data": ""}) for image in body.result.images]
        result = body.result.model_copy(update={"images": images})
        return body.model_copy(update={"result": result, "images_omitted": True}), 0

    async def _attempt_until_delivered(self, delivery: Delivery, job: str, body: JobEnd) -> None:
        def signed_now() -> bytes:
            changes = {"sent": int(time.time()), "webhook": delivery.describe()}
            return body.model_copy(update=changes).model_dump_json().encode()

        end, pause = self.clock() + self.settings.webhook_seconds, FIRST_PAUSE_SECONDS
        while True:
            delivery.attempts += 1
            attempt = await self.sender.send(delivery.url, signed_now)
            delivery.status, delivery.error = attempt.status, attempt.error
            if attempt.error is None:
                delivery.end("delivered", None)
                self.metrics.webhooks.labels("delivered").inc()
                return
            wait = random.uniform(pause / 2, pause)  # so that the webhooks of many jobs do not come together
            if attempt.final or self.clock() + wait > end:
                self._fail(delivery, job, attempt.error)
                return
            self.metrics.webhook_retries.inc()
            await self.sleep(wait)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _fail(self, delivery: Delivery, job: str, error: WebhookError) -> None:
        delivery.end("failed", error)
        self.metrics.webhooks.labels("failed").inc()
        fields = {"job": job, "attempts": delivery.attempts, "error": error}
        log.warning("the webhook of job %s failed: %s", job, error, extra=fields)


def open_webhooks(settings: Settings, metrics: Metrics) -> Webhooks | None:
    """The webhooks of the settings; None without hosts. Raises SettingError if there is no valid secret."""
    if not settings.webhook_hosts:
        if settings.webhook_secret_file:
            log.warning("webhooks are off: webhook_secret_file is set, but webhook_hosts names no host")
        return None
    networks = [ip_network(text) for text in settings.webhook_networks]
    sender = Sender(read_secrets(settings.webhook_secret_file), networks)
    rules = read_rules(settings.webhook_hosts, settings.webhook_http)
    return Webhooks(settings, metrics, sender, rules)


def read_secrets(file: str) -> list[bytes]:
    """The secrets of a file, one on each line. Raises SettingError."""
    if not file:
        raise SettingError("webhook_hosts needs webhook_secret_file, whose secret signs the webhooks")
    try:
        lines = [line.strip() for line in Path(file).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingError(f"webhook_secret_file {file} cannot be read: {reason}") from None
    secrets = [line.encode() for line in lines if line]
    if not secrets or any(len(secret) < MIN_SECRET_CHARS for secret in secrets):
        raise SettingError(
            f"{file}: expected secrets of at least {MIN_SECRET_CHARS} characters, one on each line"
        )
    return secrets

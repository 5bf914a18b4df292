"""The states of jobs and the idempotency keys of several API processes, in Redis.

All keys begin with {ldm}, so that they are in one slot of a Redis Cluster. Every change is one script, which
Redis runs without interruption:

- {ldm}:job:ID, a hash: the newest event and preview of a job, who runs it, and whether it has ended
- {ldm}:key:HASH: an idempotency key: the claim of the request that is starting its job, or the job
- {ldm}:owner:ID: exists while an API process is alive
- {ldm}:ended, {ldm}:sizes, {ldm}:bytes: ended jobs by the time of their end, the bytes of each, and their sum
- channels {ldm}:events:ID and {ldm}:commands:OWNER: a job has changed; an owner is to cancel a job
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from service.errors import Unavailable
from service.metrics import Metrics
from service.settings import SettingError, Settings

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.client import PubSub

log = logging.getLogger(__name__)

PREFIX = "{ldm}:"
CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 5.0
LEASE_SECONDS = 15.0  # after which an API process that does not renew its lease counts as gone
CLAIM_SECONDS = 30.0  # in which a request with an idempotency key must have started its job
RETRY_AFTER = 5  # seconds, of requests that are refused while Redis is not available
OPEN_MARGIN_SECONDS = 60.0  # an open job is forgotten so long after its timeout, if its owner never ends it

# Returns the holder's value, or false if the claim is taken now. ARGV: claim, milliseconds.
CLAIM = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
"""
# Deletes a claim that is still the caller's.
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
# Turns a claim into a job: returns 0 if the claim is lost. KEYS: key or '', ARGV: claim, job's value, ms.
CONFIRM = """
local held = redis.call('GET', KEYS[1])
if held ~= ARGV[1] and held ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""
# Stores an event of an open job. KEYS: job, channel. ARGV: ms, then fields and values. 0: the job has ended.
UPDATE = """
if redis.call('HEXISTS', KEYS[1], 'ended') == 1 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('HDEL', KEYS[1], 'orphaned')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('PUBLISH', KEYS[2], '')
return 1
"""
# Stores the final event, and forgets the oldest ended jobs beyond the limits.
# KEYS: job, channel, ended, sizes, bytes. ARGV: job's id, prefix, seconds kept, jobs kept, bytes kept, size,
# idempotency key or '', its value, then fields and values.
FINISH = """
if redis.call('HEXISTS', KEYS[1], 'ended') == 1 then return 0 end
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local ms = math.floor(tonumber(ARGV[3]) * 1000)
redis.call('HSET', KEYS[1], 'ended', '1', 'key', ARGV[7], unpack(ARGV, 9))
redis.call('PEXPIRE', KEYS[1], ms)
if ARGV[7] ~= '' then redis.call('SET', ARGV[7], ARGV[8], 'PX', ms) end
redis.call('ZADD', KEYS[3], now, ARGV[1])
redis.call('HSET', KEYS[4], ARGV[1], ARGV[6])
redis.call('INCRBY', KEYS[5], ARGV[6])
local function forget(id)
  local job = ARGV[2] .. 'job:' .. id
  local key = redis.call('HGET', job, 'key')
  if key and key ~= '' then redis.call('DEL', key) end
  redis.call('DEL', job)
  redis.call('DECRBY', KEYS[5], redis.call('HGET', KEYS[4], id) or 0)
  redis.call('HDEL', KEYS[4], id)
  redis.call('ZREM', KEYS[3], id)
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now - tonumber(ARGV[3]))) do forget(id) end
local function too_many()
  local count = redis.call('ZCARD', KEYS[3])
  local bytes = tonumber(redis.call('GET', KEYS[5]) or 0)
  return count > tonumber(ARGV[4]) or (bytes > tonumber(ARGV[5]) and count > 1)
end
while too_many() do forget(redis.call('ZRANGE', KEYS[3], 0, 0)[1]) end
redis.call('PUBLISH', KEYS[2], '')
return 1
"""
# Stores a field of a job that is still kept. KEYS: job. ARGV: field, value.
AMEND = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
"""
# Whether the owner of an open job is gone: its lease was missing for ARGV[1] seconds. KEYS: job, lease.
IS_LOST = """
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('HEXISTS', KEYS[1], 'ended') == 1 then return 0 end
if redis.call('EXISTS', KEYS[2]) == 1 then redis.call('HDEL', KEYS[1], 'orphaned') return 0 end
local now = tonumber(redis.call('TIME')[1])
redis.call('HSETNX', KEYS[1], 'orphaned', now)
return now - tonumber(redis.call('HGET', KEYS[1], 'orphaned')) >= tonumber(ARGV[1]) and 1 or 0
"""


class Claim(NamedTuple):
    """The use of an idempotency key. key: in Redis; digest: of the body; token: of this request."""

    key: str
    digest: str
    token: str

    @property
    def text(self) -> str:
        return json.dumps({"digest": self.digest, "token": self.token})

    def of_job(self, job: str) -> str:
        return json.dumps({"digest": self.digest, "job": job})


class Holder(NamedTuple):
    """Who has an idempotency key. job: None while it is being started."""

    digest: str
    job: str | None


@dataclass(frozen=True)
class Snapshot:
    """The newest event of a job. owner: the process that runs it; client: the id of the client whose it is.

    status: JSON of a JobStatus; preview: JSON of a JobPreview; webhook: JSON of a WebhookStatus that is newer
    than that in the status, or "".
    """

    owner: str
    client: str
    request_id: str
    number: int
    name: str
    status: str
    ended: bool
    preview: str
    preview_number: int
    webhook: str = ""


class RedisStore:
    """The shared store. Every method raises Unavailable while Redis cannot be reached."""

    def __init__(self, client: Redis, settings: Settings, metrics: Metrics) -> None:
        self.client = client
        self.settings = settings
        self.metrics = metrics
        self.owner = uuid.uuid4().hex  # the name of this process
        self._scripts: dict[str, Any] = {}

    async def check(self) -> None:
        """Raise Unavailable if Redis does not answer."""
        with self._available():
            await self.client.ping()

    async def close(self) -> None:
        with suppress(Exception):
            await self.client.aclose()

    async def claim(self, claim: Claim) -> Holder | None:
        """Take an idempotency key; returns the holder if another request has it."""
        held = await self.run(CLAIM, [claim.key], claim.text, int(CLAIM_SECONDS * 1000))
        if not held:
            return None
        fields = json.loads(held)
        return Holder(fields["digest"], fields.get("job"))

    async def release(self, claim: Claim) -> None:
        """Release an idempotency key whose job was not started."""
        await self.run(RELEASE, [claim.key], claim.text)

    async def confirm(self, claim: Claim, job: str) -> bool:
        """Give an idempotency key to the job that was started; False if another request has taken it."""
        return bool(await self.run(CONFIRM, [claim.key], claim.text, claim.of_job(job), self._open_ms()))

    async def update(self, job: str, fields: dict[str, str | int]) -> bool:
        """Store fields of a Snapshot of an open job; False if it has ended."""
        keys = [PREFIX + f"job:{job}", PREFIX + f"events:{job}"]
        return bool(await self.run(UPDATE, keys, self._open_ms(), *flat(fields)))

    async def finish(self, job: str, fields: dict[str, str | int], size: int, claim: Claim | None) -> bool:
        """Store the final Snapshot of a job, with the limits of settings; False if it has ended before."""
        limits = self.settings
        names = (f"job:{job}", f"events:{job}", "ended", "sizes", "bytes")
        key, value = (claim.key, claim.of_job(job)) if claim else ("", "")
        kept = (limits.jobs_seconds, limits.jobs_kept, limits.jobs_bytes)
        keys = [PREFIX + name for name in names]
        return bool(await self.run(FINISH, keys, job, PREFIX, *kept, size, key, value, *flat(fields)))

    async def set_webhook(self, job: str, webhook: str) -> None:
        """Store the JSON of a WebhookStatus of an ended job, unless the job was forgotten."""
        await self.run(AMEND, [PREFIX + f"job:{job}"], "webhook", webhook)

    async def read(self, job: str) -> Snapshot | None:
        """The newest event of a job, if it is known."""
        with self._available():
            found = await self.client.hgetall(PREFIX + f"job:{job}")
        values = {as_text(name): as_text(value) for name, value in found.items()}
        if "status" not in values:
            return None
        return Snapshot(
            values["owner"],
            values.get("client", ""),
            values["request_id"],
            int(values["number"]),
            values["name"],
            values["status"],
            "ended" in values,
            values.get("preview", ""),
            int(values.get("preview_number", -1)),
            values.get("webhook", ""),
        )

    async def is_lost(self, job: str, owner: str) -> bool:
        """Whether the process that runs a job has been gone for LEASE_SECONDS."""
        keys = [PREFIX + f"job:{job}", PREFIX + f"owner:{owner}"]
        return bool(await self.run(IS_LOST, keys, LEASE_SECONDS))

    async def is_alive(self, owner: str) -> bool:
        """Whether a process renews its lease."""
        with self._available():
            return bool(await self.client.exists(PREFIX + f"owner:{owner}"))

    async def renew_lease(self, owner: str) -> None:
        """Report that this process is alive."""
        with self._available():
            await self.client.set(PREFIX + f"owner:{owner}", "1", px=int(LEASE_SECONDS * 1000))

    async def end_lease(self, owner: str) -> None:
        with self._available():
            await self.client.delete(PREFIX + f"owner:{owner}")

    async def ask_to_cancel(self, job: str, owner: str) -> None:
        with self._available():
            await self.client.publish(PREFIX + f"commands:{owner}", job)

    @asynccontextmanager
    async def changes(self, job: str) -> AsyncIterator[PubSub]:
        """Messages whenever a job changes."""
        async with self._subscription(f"events:{job}") as messages:
            yield messages

    @asynccontextmanager
    async def commands(self, owner: str) -> AsyncIterator[PubSub]:
        """Messages with the ids of jobs that this process is to cancel."""
        async with self._subscription(f"commands:{owner}") as messages:
            yield messages

    @asynccontextmanager
    async def _subscription(self, name: str) -> AsyncIterator[PubSub]:
        pubsub = self.client.pubsub(ignore_subscribe_messages=True)
        try:
            with self._available():
                await pubsub.subscribe(PREFIX + name)
            yield pubsub
        finally:
            with suppress(Exception):
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def next_message(self, messages: PubSub, seconds: float) -> str | None:
        """The text of the next message; None after so many seconds."""
        with self._available():
            message = await messages.get_message(timeout=seconds)
        return message["data"].decode() if message else None

    def _open_ms(self) -> int:
        """Milliseconds for which an open job is remembered without news."""
        seconds = self.settings.timeout + self.settings.jobs_seconds + OPEN_MARGIN_SECONDS
        return int(seconds * 1000)

    async def run(self, script: str, keys: list[str], *values: str | int | float) -> Any:
        """The result of a script."""
        if script not in self._scripts:
            self._scripts[script] = self.client.register_script(script)
        with self._available():
            return await self._scripts[script](keys=keys, args=list(values))

    @contextmanager
    def _available(self) -> Iterator[None]:
        """Raise Unavailable for every error of the connection or of Redis."""
        from redis.exceptions import RedisError

        try:
            yield
        except (RedisError, OSError, TimeoutError) as error:
            self.metrics.job_store_errors.inc()
            log.warning("the job store does not work: %s: %s", type(error).__name__, error)
            raise Unavailable("the job store is not available", retry_after=RETRY_AFTER) from error


def as_text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode()


def flat(fields: dict[str, str | int]) -> list[str | int]:
    """Names and values in turn, as Redis takes them."""
    return [part for pair in fields.items() for part in pair]


def open_store(settings: Settings, metrics: Metrics) -> RedisStore:
    """The store that a setting names. Raises SettingError for a wrong URL, and without the package redis."""
    try:
        from redis.asyncio import Redis
    except ImportError:
        raise SettingError("job_store needs the package redis: pip install '.[redis]'") from None
    try:
        client = Redis.from_url(
            settings.job_store, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=ANSWER_SECONDS
        )
    except ValueError as error:
        raise SettingError(f"job_store is not a Redis URL: {error}") from None
    return RedisStore(client, settings, metrics)

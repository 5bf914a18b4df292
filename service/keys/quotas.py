"""Quotas: how much a client may use in any window of time, and what is left.

A window is a sliding one, counted in slots of a sixtieth of its length: a use counts until its whole slot is
older than the window, so that no window, wherever it begins, contains more than the quota.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

from cachetools import TTLCache

from service.errors import InvalidRequest, RateLimited, Unavailable
from service.keys.client import Client

log = logging.getLogger(__name__)

SLOTS = 60  # of a window
MAX_WINDOWS = 100_000  # kept in memory; the oldest are forgotten
JOBS_RETRY_SECONDS = 5  # Retry-After while a client has as many jobs as it may: nobody knows when one ends

Kind = Literal["requests", "images", "jobs"]
WINDOWS: dict[Kind, int] = {"requests": 60, "images": 3600}  # seconds


@dataclass(frozen=True)
class Quota:
    """kind: what is counted; count: the most in `window` seconds, or at the same time if that is None."""

    kind: Kind
    count: int

    @property
    def window(self) -> int | None:
        return WINDOWS.get(self.kind)

    @property
    def slot(self) -> float:
        """The length of a slot in seconds."""
        return (self.window or 0) / SLOTS


@dataclass(frozen=True)
class Verdict:
    """Whether a client may use what it asked for, after which `left` is left of its quota.

    seconds: until it fits, if it may not; otherwise until the oldest use no longer counts.
    """

    quota: Quota
    allowed: bool
    left: int
    seconds: int


REFUSALS: dict[Kind, str] = {
    "requests": "this key is limited to {} requests a minute",
    "images": "this key is limited to {} images an hour",
    "jobs": "this key is limited to {} jobs at the same time, queued or running",
}


def judge(quota: Quota, cost: int, uses: Mapping[int, int], now: float) -> Verdict:
    """The verdict on a use. uses: slot -> amount, of the slots that still count at the time `now`."""
    used = sum(uses.values())
    if used + cost <= quota.count:
        oldest = min(uses, default=math.floor(now / quota.slot))
        return Verdict(quota, True, quota.count - used - cost, seconds_until(quota, oldest, now))
    excess, slot = used + cost - quota.count, 0
    for slot in sorted(uses):
        excess -= uses[slot]
        if excess <= 0:
            break
    return Verdict(quota, False, max(0, quota.count - used), seconds_until(quota, slot, now))


def seconds_until(quota: Quota, slot: int, now: float) -> int:
    """Whole seconds until a slot no longer counts."""
    return max(1, math.ceil((slot + SLOTS + 1) * quota.slot - now))


def judge_jobs(quota: Quota, open_jobs: int, allowed: bool) -> Verdict:
    """The verdict on one more job of a client that had this many."""
    return Verdict(quota, allowed, max(0, quota.count - open_jobs - allowed), JOBS_RETRY_SECONDS)


class Counts(Protocol):
    """Counts uses and jobs: MemoryCounts, or cluster.redis_quotas for several servers.

    client: the id of a client. Every method raises Unavailable if it cannot count.
    """

    async def take(self, client: str, quota: Quota, cost: int) -> Verdict:
        """Count a use if it is allowed."""

    async def enter(self, client: str, quota: Quota, job: str) -> Verdict:
        """Count a job until leave(), if it is allowed. job: any name that no other job has."""

    async def leave(self, client: str, job: str) -> None:
        """Count a job no longer."""


class MemoryCounts:
    """The uses and jobs of the clients of this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: defaultdict[str, set[str]] = defaultdict(set)
        self._uses: TTLCache[tuple[str, Kind], dict[int, int]] = TTLCache(
            MAX_WINDOWS, 2 * max(WINDOWS.values()), clock
        )

    async def take(self, client: str, quota: Quota, cost: int) -> Verdict:
        now = self._clock()
        slot = math.floor(now / quota.slot)
        uses = {at: n for at, n in self._uses.get((client, quota.kind), {}).items() if at >= slot - SLOTS}
        verdict = judge(quota, cost, uses, now)
        if verdict.allowed:
            uses[slot] = uses.get(slot, 0) + cost
        self._uses[client, quota.kind] = uses
        return verdict

    async def enter(self, client: str, quota: Quota, job: str) -> Verdict:
        count = len(self._jobs[client])
        if count < quota.count:
            self._jobs[client].add(job)
        return judge_jobs(quota, count, count < quota.count)

    async def leave(self, client: str, job: str) -> None:
        self._jobs[client].discard(job)
        if not self._jobs[client]:
            del self._jobs[client]


@dataclass(eq=False)
class Caller:
    """The client of a request, and the verdicts on its quotas. request_id: of the request."""

    client: Client
    request_id: str
    verdicts: dict[Kind, Verdict] = field(default_factory=dict)


class Quotas:
    """The quotas of all clients.

    shared: counts for several servers; while it fails, this server counts alone.
    """

    def __init__(self, shared: Counts | None = None, own: Counts | None = None) -> None:
        self._own = own or MemoryCounts()
        self._shared = shared
        self._leaving: set[asyncio.Task[None]] = set()

    async def take_request(self, caller: Caller) -> None:
        """Count a request. Raises RateLimited."""
        if count := caller.client.limits.requests_per_minute:
            quota = Quota("requests", count)
            await self._ask(caller, quota, lambda counts: counts.take(caller.client.id, quota, 1))

    async def take_images(self, caller: Caller, images: int) -> None:
        """Count images. Raises RateLimited, and InvalidRequest for more than there are in an hour."""
        if count := caller.client.limits.images_per_hour:
            if images > count:
                raise InvalidRequest(f"n must be at most {count}, the images an hour of this key", param="n")
            quota = Quota("images", count)
            await self._ask(caller, quota, lambda counts: counts.take(caller.client.id, quota, images))

    async def begin_job(self, caller: Caller) -> Callable[[], None]:
        """Count a job until the function that is returned is called. Raises RateLimited."""
        count = caller.client.limits.running_jobs
        if count is None:
            return lambda: None
        quota, client, job = Quota("jobs", count), caller.client.id, uuid.uuid4().hex
        counts = await self._ask(caller, quota, lambda counts: counts.enter(client, quota, job))
        return lambda: self._in_background(counts.leave(client, job))

    async def _ask(self, caller: Caller, quota: Quota, ask: Callable[[Counts], Awaitable[Verdict]]) -> Counts:
        """Note the verdict, of the shared counts if they work, otherwise of this server's own.

        Returns the counts that gave it. Raises RateLimited.
        """
        counts = self._shared or self._own
        try:
            verdict = await ask(counts)
        except Unavailable:
            log.warning("limits of keys are counted by this server alone: the job store does not work")
            counts = self._own
            verdict = await ask(counts)
        caller.verdicts[quota.kind] = verdict
        if not verdict.allowed:
            raise RateLimited(REFUSALS[quota.kind].format(quota.count), retry_after=verdict.seconds)
        return counts

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(ignoring_outages(work))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


async def ignoring_outages(work: Coroutine[None, None, None]) -> None:
    """Do some work; Unavailable is ignored, because what the store still counts expires there."""
    with suppress(Unavailable):
        await work


def headers_of(verdicts: Iterable[Verdict]) -> list[tuple[bytes, bytes]]:
    """The header fields RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers-10)."""
    verdicts = list(verdicts)
    if not verdicts:
        return []
    policies, states = ", ".join(map(policy_of, verdicts)), ", ".join(map(state_of, verdicts))
    return [(b"ratelimit-policy", policies.encode()), (b"ratelimit", states.encode())]


def policy_of(verdict: Verdict) -> str:
    quota = verdict.quota
    unit = {"requests": "", "images": ';qu="images"', "jobs": ';qu="concurrent-requests"'}[quota.kind]
    return f'"{quota.kind}";q={quota.count}{unit}' + (f";w={quota.window}" if quota.window else "")


def state_of(verdict: Verdict) -> str:
    return f'"{verdict.quota.kind}";r={verdict.left};t={verdict.seconds}'

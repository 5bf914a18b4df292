"""The uses of quotas in Redis, counted for all servers that share a job store.

- {ldm}:uses:KIND:HASH, a hash: the amount used in each slot of a window; see keys.quotas
- {ldm}:jobs:HASH, a set: OWNER/JOB for each open job of a client; those of servers that are gone do not count
"""

from __future__ import annotations

import hashlib

from service.cluster.redis_store import PREFIX, RedisStore
from service.keys.quotas import SLOTS, Quota, Verdict, judge, judge_jobs

# Counts a use if it is allowed. KEYS: uses. ARGV: length of a slot, slots, quota, cost.
# Returns the time, then the slots and amounts before the use.
TAKE = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local slot = math.floor(now / tonumber(ARGV[1]))
local fields = redis.call('HGETALL', KEYS[1])
local used, uses = 0, {}
for i = 1, #fields, 2 do
  if tonumber(fields[i]) < slot - tonumber(ARGV[2]) then
    redis.call('HDEL', KEYS[1], fields[i])
  else
    used = used + tonumber(fields[i + 1])
    table.insert(uses, fields[i])
    table.insert(uses, fields[i + 1])
  end
end
if used + tonumber(ARGV[4]) <= tonumber(ARGV[3]) then
  redis.call('HINCRBY', KEYS[1], slot, ARGV[4])
  redis.call('EXPIRE', KEYS[1], math.ceil(tonumber(ARGV[1]) * (tonumber(ARGV[2]) + 2)))
end
return {tostring(now), unpack(uses)}
"""


# Counts a job if it is allowed. KEYS: jobs. ARGV: prefix of the leases of servers, quota, owner/job, seconds.
# Returns whether it is, and the number of jobs before it.
ENTER = """
for _, job in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local owner = string.match(job, '^[^/]*')
  if redis.call('EXISTS', ARGV[1] .. owner) == 0 then redis.call('SREM', KEYS[1], job) end
end
local count = redis.call('SCARD', KEYS[1])
if count >= tonumber(ARGV[2]) then return {0, count} end
redis.call('SADD', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return {1, count}
"""
LEAVE = "return redis.call('SREM', KEYS[1], ARGV[1])"
MAX_JOB_SECONDS = 2 * 86_400  # longer than any timeout of a job


class RedisCounts:
    """As MemoryCounts, for all servers of a store."""

    def __init__(self, store: RedisStore) -> None:
        self.store = store

    async def enter(self, client: str, quota: Quota, job: str) -> Verdict:
        values = (PREFIX + "owner:", quota.count, f"{self.store.owner}/{job}", MAX_JOB_SECONDS)
        allowed, count = await self.store.run(ENTER, [key_of("jobs", client)], *values)
        return judge_jobs(quota, count, bool(allowed))

    async def leave(self, client: str, job: str) -> None:
        await self.store.run(LEAVE, [key_of("jobs", client)], f"{self.store.owner}/{job}")

    async def take(self, client: str, quota: Quota, cost: int) -> Verdict:
        values = quota.slot, SLOTS, quota.count, cost
        now, *fields = await self.store.run(TAKE, [key_of(f"uses:{quota.kind}", client)], *values)
        numbers = list(map(int, fields))
        return judge(quota, cost, dict(zip(numbers[::2], numbers[1::2], strict=True)), float(now))


def key_of(kind: str, client: str) -> str:
    """The Redis key of a client's counts; the client's id cannot be read from it."""
    return f"{PREFIX}{kind}:{hashlib.sha256(client.encode()).hexdigest()}"

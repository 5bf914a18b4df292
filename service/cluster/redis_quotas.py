"""The uses of quotas in Redis, counted for all servers that share a job store.

{ldm}:uses:KIND:HASH, a hash, has the amount used in each slot of a window; see keys.quotas.
"""

from __future__ import annotations

import hashlib

from service.cluster.redis_store import PREFIX, RedisStore
from service.keys.quotas import SLOTS, Quota, Verdict, judge

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


class RedisWindows:
    """As MemoryWindows, for all servers of a store."""

    def __init__(self, store: RedisStore) -> None:
        self.store = store

    async def take(self, client: str, quota: Quota, cost: int) -> Verdict:
        key = f"{PREFIX}uses:{quota.kind}:{hashlib.sha256(client.encode()).hexdigest()}"
        now, *fields = await self.store.run(TAKE, [key], quota.slot, SLOTS, quota.count, cost)
        numbers = list(map(int, fields))
        return judge(quota, cost, dict(zip(numbers[::2], numbers[1::2], strict=True)), float(now))

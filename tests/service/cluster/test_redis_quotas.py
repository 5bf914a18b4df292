"""Quotas that several servers count together, in a real Redis."""

from __future__ import annotations

import asyncio

import pytest

from service.cluster.redis_quotas import RedisCounts
from service.cluster.redis_store import open_store
from service.keys.quotas import MemoryCounts, Quota, Verdict
from service.metrics import Metrics
from service.settings import Settings
from tests.helpers.redis_servers import RedisServer, redis_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def redis(tmp_path_factory) -> RedisServer:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


def run(redis: RedisServer, client: str, quota: Quota, costs: list[int]) -> list[Verdict]:
    """The verdicts of two servers in turn."""

    async def scenario() -> list[Verdict]:
        stores = [open_store(Settings(job_store=redis.url), Metrics()) for _ in range(2)]
        windows = [RedisCounts(store) for store in stores]
        verdicts = [await windows[index % 2].take(client, quota, cost) for index, cost in enumerate(costs)]
        assert await stores[0].client.pttl((await stores[0].client.keys("*"))[0]) > 0
        for store in stores:
            await store.close()
        return verdicts

    return asyncio.run(scenario())


def test_two_servers_count_together_as_one_does_in_memory(redis):
    quota, costs = Quota("images", 10), [4, 4, 4, 2, 1]

    async def in_memory() -> list[Verdict]:
        windows = MemoryCounts()
        return [await windows.take("key a", quota, cost) for cost in costs]

    shared, own = run(redis, "key a", quota, costs), asyncio.run(in_memory())
    assert [(one.allowed, one.left) for one in shared] == [(one.allowed, one.left) for one in own]
    assert [one.allowed for one in shared] == [True, True, False, True, False]
    assert all(3540 <= one.seconds <= 3661 for one in shared)


def test_slots_that_are_too_old_no_longer_count(redis):
    async def scenario() -> Verdict:
        store = open_store(Settings(job_store=redis.url), Metrics())
        windows, quota = RedisCounts(store), Quota("requests", 3)
        await windows.take("key b", quota, 3)
        (key,) = await store.client.keys("*requests*")
        ((slot, amount),) = (await store.client.hgetall(key)).items()
        await store.client.delete(key)
        await store.client.hset(key, int(slot) - 62, amount)
        await store.client.hset(key, int(slot) - 30, 1)
        verdict = await windows.take("key b", quota, 2)
        assert len(await store.client.hgetall(key)) == 2
        await store.close()
        return verdict

    verdict = asyncio.run(scenario())
    assert (verdict.allowed, verdict.left) == (True, 0)
    assert 28 <= verdict.seconds <= 31  # until the older of the two slots is gone

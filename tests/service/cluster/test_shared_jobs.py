"""The jobs of several API processes in one real Redis; each process is a Jobs with a fake worker here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.cluster import shared_jobs
from service.cluster.redis_store import PREFIX, RedisStore, open_store
from service.cluster.shared_jobs import SharedJobs
from service.engine.events import Done
from service.errors import InvalidRequest, NotFound, Unavailable
from service.keys.client import ANYBODY
from service.requests.background import Jobs
from service.requests.job_record import JobView, Record
from service.requests.job_schemas import GenerateJob
from service.settings import Settings
from tests.checkpoints.tiny import tiny_spec
from tests.helpers.redis_servers import RedisServer, redis_server
from tests.helpers.supervisors import Worker, caller, run, supervisor

PIXELS = bytes(64 * 64 * 3)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> RedisServer:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(running: RedisServer) -> RedisServer:
    """A Redis without contents."""

    async def empty() -> None:
        store = store_of(running)
        await store.client.flushall()
        await store.close()

    asyncio.run(empty())
    return running


def store_of(redis: RedisServer, **settings) -> RedisStore:
    service = supervisor()
    return open_store(Settings(job_store=redis.url, **settings), service.metrics)


class Api:
    """An API process."""

    def __init__(self, redis: RedisServer, **settings) -> None:
        self.supervisor = supervisor(**settings)
        self.supervisor.models.specs, self.supervisor.models.known = {"tiny": tiny_spec()}, True
        self.jobs = Jobs(self.supervisor)
        self.shared = SharedJobs(self.jobs, store_of(redis, **settings))

    async def submit(self, key: str | None = None, seed: int = 1) -> JobView:
        request = {"prompt": "p", "seed": seed, "steps": 5}
        body = GenerateJob.model_validate({"task": "generate", "request": request})
        return await self.shared.submit(body, key, caller())

    def worker(self, job: JobView) -> Worker:
        return Worker(self.supervisor, job.id)

    async def end(self, job: JobView) -> None:
        """Let the worker finish a job."""
        assert isinstance(job, Record)
        await asyncio.sleep(0.05)  # for the job to reach the worker
        self.worker(job).say(Done(job.id, (PIXELS,), (), 0.1, 0.2, 0.3))
        await asyncio.wait({job.work})

    async def cancel_all(self) -> None:
        for record in list(self.jobs._records.values()):
            await record.cancel()

    async def status(self, job: JobView) -> str:
        return (await (await self.shared.find(job.id, ANYBODY)).describe()).status


@asynccontextmanager
async def apis(redis: RedisServer, count: int = 2, **settings) -> AsyncIterator[list[Api]]:
    made = [Api(redis, **settings) for _ in range(count)]
    running = [api.shared.run() for api in made]
    for one in running:
        await one.__aenter__()
    try:
        yield made
    finally:
        for api, one in zip(made, running, strict=True):
            await api.cancel_all()
            await one.__aexit__(None, None, None)


async def until(condition, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


def test_another_process_answers_for_a_job_from_its_start_to_its_end(redis):
    async def scenario():
        async with apis(redis) as (one, two):
            job = await one.submit()
            assert await two.status(job) == "queued"
            await asyncio.sleep(0.05)
            one.worker(job).start(5)
            one.worker(job).step(3)

            async def at_step_3() -> bool:
                return (await (await two.shared.find(job.id, ANYBODY)).describe()).step == 3

            await until(at_step_3)
            await one.end(job)

            async def done() -> bool:
                return await two.status(job) == "done"

            await until(done)
            here, there = [await (await api.shared.find(job.id, ANYBODY)).describe() for api in (one, two)]
            assert there == here
            assert there.result.images[0].data
            with pytest.raises(NotFound):
                await two.shared.find("nothing", ANYBODY)

    run(scenario())


def test_events_are_the_same_at_both_and_continue_after_a_number(redis):
    async def scenario():
        async with apis(redis) as (one, two):
            job = await one.submit()
            remote = await two.shared.find(job.id, ANYBODY)
            seen = remote.events()
            first = await anext(seen)
            assert (first.name, first.data.status) == ("queued", "queued")
            await asyncio.sleep(0.05)
            one.worker(job).start(5)
            one.worker(job).step(2)
            event = first
            while event.data.step < 2:
                event = await anext(seen)
            assert (event.name, event.number) == ("step", job.progress.state.number)
            await seen.aclose()
            continued = remote.events(event.number)
            one.worker(job).step(4)
            later = await anext(continued)
            assert (later.name, later.data.step, later.number > event.number) == ("step", 4, True)
            await one.end(job)
            names = [event.name async for event in continued]
            assert names[-1] == "done"
            assert [event.name async for event in remote.events()] == ["done"]

    run(scenario())


def test_a_preview_reaches_watchers_at_another_process(redis):
    async def scenario():
        async with apis(redis) as (one, two):
            request = {"prompt": "p", "steps": 5}
            body = {"task": "generate", "request": request, "preview_every": 1}
            job = await one.shared.submit(GenerateJob.model_validate(body), None, caller())
            seen = (await two.shared.find(job.id, ANYBODY)).events()
            await anext(seen)
            await asyncio.sleep(0.05)
            one.worker(job).start(5)
            one.worker(job).preview(1)
            while (event := await anext(seen)).name != "preview":
                pass
            assert (event.data.step, event.data.media_type) == (1, "image/jpeg")
            await seen.aclose()
            await one.end(job)

    run(scenario())


def test_a_job_is_cancelled_from_another_process(redis):
    async def scenario():
        async with apis(redis) as (one, two):
            job = await one.submit()
            await (await two.shared.find(job.id, ANYBODY)).cancel()
            assert await two.status(job) == await one.status(job) == "cancelled"
            assert one.supervisor.slots_in_use == 0

    run(scenario())


def test_a_repeated_key_gives_the_first_job_at_every_process(redis):
    async def scenario():
        async with apis(redis) as (one, two):
            jobs = await asyncio.gather(*(api.submit("k") for api in (one, two) * 3))
            assert len({job.id for job in jobs}) == 1
            assert one.supervisor.slots_in_use + two.supervisor.slots_in_use == 1
            with pytest.raises(InvalidRequest, match="another body"):
                await two.submit("k", seed=2)
            assert (await two.submit("other")).id != jobs[0].id

    run(scenario())


def test_a_key_whose_job_could_not_start_can_be_used_again(redis):
    async def scenario():
        async with apis(redis, queue_size=1) as (one, two):
            await one.submit()
            for _ in range(2):
                with pytest.raises(Exception, match="queue is full"):
                    await one.submit("k")
                await asyncio.sleep(0.1)
            assert await two.submit("k")

    run(scenario())


def test_the_oldest_ended_jobs_are_forgotten_beyond_the_limits(redis):
    async def scenario():
        async with apis(redis, jobs_kept=2) as (one, two):
            jobs = [await one.submit(f"k{number}") for number in range(3)]
            for job in jobs:
                await one.end(job)
                await asyncio.sleep(0.2)
            with pytest.raises(NotFound):
                await two.shared.find(jobs[0].id, ANYBODY)
            assert [await two.status(job) for job in jobs[1:]] == ["done", "done"]
            assert (await two.submit("k0")).id != jobs[0].id
            assert (await two.submit("k2")).id == jobs[2].id

    run(scenario())


def test_the_newest_ended_job_stays_whatever_its_size_and_others_go_by_bytes(redis):
    async def scenario():
        async with apis(redis, jobs_bytes=1) as (one, two):
            for _ in range(2):
                job = await one.submit()
                await one.end(job)
                await asyncio.sleep(0.2)
                assert await two.status(job) == "done"
            store = two.shared.store
            assert await store.client.zcard(PREFIX + "ended") == 1
            assert int(await store.client.get(PREFIX + "bytes")) == job.bytes

    run(scenario())


def test_ended_jobs_are_forgotten_after_their_time(redis):
    async def scenario():
        async with apis(redis, jobs_seconds=0.3) as (one, two):
            job = await one.submit()
            await one.end(job)

            async def forgotten() -> bool:
                try:
                    await two.shared.find(job.id, ANYBODY)
                except NotFound:
                    return True
                return False

            await until(forgotten)

    run(scenario())


def test_without_redis_new_jobs_are_refused_and_running_ones_finish(redis):
    async def scenario():
        async with apis(redis) as (one, two):
            job = await one.submit()
            remote = await two.shared.find(job.id, ANYBODY)
            seen = remote.events()
            await anext(seen)
            redis.stop()
            with pytest.raises(Unavailable):
                await one.submit()
            with pytest.raises(Unavailable):
                await one.submit("k")
            with pytest.raises(Unavailable):
                await two.shared.find(job.id, ANYBODY)
            assert one.supervisor.slots_in_use == 1, "refused jobs hold no slot"
            await one.end(job)
            assert await one.status(job) == "done"
            redis.start()
            names = [event.name async for event in seen if event]
            assert names[-1:] == ["done"]
            assert await two.status(job) == "done"
            assert await two.submit("k")

    run(scenario())


def test_a_redis_that_comes_back_empty_gets_the_running_jobs_again(redis):
    async def scenario():
        async with apis(redis) as (one, two):
            job = await one.submit("k")
            await two.shared.store.client.flushall()
            await one.end(job)

            async def done() -> bool:
                try:
                    return await two.status(job) == "done"
                except NotFound:
                    return False

            await until(done)
            assert (await two.submit("k")).id == job.id

    run(scenario())


def test_the_jobs_of_a_process_that_dies_fail_at_the_others(redis, monkeypatch):
    monkeypatch.setattr("service.cluster.redis_store.LEASE_SECONDS", 1.0)
    monkeypatch.setattr(shared_jobs, "LEASE_RENEWAL_SECONDS", 0.2)

    async def scenario():
        async with apis(redis, count=1) as (two,):
            one = Api(redis)  # its lease is never renewed
            job = await one.submit("k")

            async def failed() -> bool:
                return await two.status(job) == "failed"

            await until(failed)
            status = await (await two.shared.find(job.id, ANYBODY)).describe()
            assert status.error.code == "job_failed"
            assert "ended without finishing" in status.error.message
            assert await two.shared.store.is_lost(job.id, one.shared.owner) is False, "it has ended"
            await one.end(job)  # too late: nothing is answered twice
            await asyncio.sleep(0.3)
            assert await two.status(job) == "failed"
            await one.shared.store.close()

    run(scenario())

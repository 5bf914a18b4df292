"""Several replicas behind one queue: without processes, then over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.engine.events import Done, JobSteps, Started, Stepped, Withdrawn
from service.engine.job import Job
from service.errors import Unavailable, WorkerLost
from service.worker.protocol import Cancel, Fatal, Submit, Withdraw
from service.worker.replica import WorkerFailed
from service.worker.supervisor import Supervisor
from tests.helpers.clients import post, together, wait_for_running
from tests.helpers.fake_runner import make_job
from tests.helpers.servers import wait_until
from tests.helpers.supervisors import Worker, run, supervisor


def pair(**settings) -> tuple[Supervisor, list[Worker]]:
    """A supervisor of two replicas with fake workers, both ready, with model m."""
    service = supervisor(device="cpu", replicas="2", **settings)
    workers = [Worker(service, replica=number) for number in (0, 1)]
    for worker in workers:
        worker.become_ready("m")
    return service, workers


async def submit(service: Supervisor, *jobs: Job) -> list[asyncio.Task[Done]]:
    tasks = [asyncio.create_task(service.run(job)) for job in jobs]
    await asyncio.sleep(0)
    return tasks


def jobs_of(worker: Worker) -> list[str]:
    """The jobs that were submitted to a worker."""
    return [command.job.id for command in worker.sent if isinstance(command, Submit)]


def die(service: Supervisor, worker: Worker, cause: str = "kill") -> None:
    worker.replica.worker = None
    service.requeue(worker.replica, cause, 10.0)


def start(worker: Worker, *jobs: str, steps: int = 50) -> None:
    for job in jobs:
        worker.say(Started(job, steps))


def finish(worker: Worker, job: str) -> None:
    worker.say(Done(job, (b"",), (), 0.0, 0.0, 0.0))


def test_jobs_are_shared_out():
    async def scenario():
        service, workers = pair()
        await submit(service, *(make_job(str(number)) for number in range(6)))
        assert [len(jobs_of(worker)) for worker in workers] == [3, 3]
        assert [service.jobs_at(replica) for replica in service.replicas] == [3, 3]

    run(scenario())


def test_jobs_of_a_replica_that_dies_go_to_the_other():
    async def scenario():
        service, workers = pair()
        tasks = await submit(service, make_job("a", steps=50), make_job("b", steps=50))
        (first,), (second,) = map(jobs_of, workers)
        start(workers[0], first)
        die(service, workers[0])
        assert jobs_of(workers[1]) == [second, first]
        assert service.ready
        for job in (first, second):
            finish(workers[1], job)
        await asyncio.gather(*tasks)

    run(scenario())


def test_a_waiting_job_is_given_back_and_sent_to_an_idle_replica():
    async def scenario():
        service, workers = pair()
        await submit(service, *(make_job(str(number), steps=50) for number in range(6)))
        mine, other = map(jobs_of, workers)
        start(workers[0], mine[0])
        for job in other:
            finish(workers[1], job)
            await asyncio.sleep(0.01)
        assert workers[0].sent[-1] == Withdraw(mine[1])
        workers[0].say(Withdrawn(mine[1]))
        assert jobs_of(workers[1])[-1] == mine[1]

    run(scenario())


def test_a_job_that_is_cancelled_while_it_moves_goes_nowhere():
    async def scenario():
        service, workers = pair()
        tasks = await submit(service, *(make_job(str(number), steps=50) for number in range(6)))
        mine, other = map(jobs_of, workers)
        start(workers[0], mine[0])
        for job in other:
            finish(workers[1], job)
            await asyncio.sleep(0.01)
        tasks[int(mine[1])].cancel()
        await asyncio.sleep(0.01)
        assert Cancel(mine[1]) in workers[0].sent
        before = list(workers[1].sent)
        workers[0].say(Withdrawn(mine[1]))
        assert workers[1].sent == before

    run(scenario())


def test_calls_are_counted_and_listed_by_replica():
    async def scenario():
        service, workers = pair()
        for worker, rows in zip(workers, (2, 4), strict=True):
            worker.say(Stepped(rows, rows, 1, 0.1, 1, 0, (JobSteps("x", 1, rows),)))
        assert [(one.replica, one.call.rows) for one in service.calls.after(0)] == [(0, 2), (1, 4)]
        value = service.metrics.registry.get_sample_value
        assert [value("ldm_unet_rows_sum", {"replica": label}) for label in "01"] == [2, 4]

    run(scenario())


def test_a_suspect_runs_alone_at_one_replica_while_the_other_serves():
    async def scenario():
        service, workers = pair()
        for worker in workers:
            worker.process.clock = lambda: 1000.0  # all are old enough for a suspect
        (task,) = await submit(service, make_job("poison", steps=50))
        for _ in range(2):
            at = next(worker for worker in workers if "poison" in jobs_of(worker)[-1:])
            die(service, at, "crash")
            at = workers[at.replica.number] = Worker(service, replica=at.replica.number)
            at.process.clock = lambda: 1000.0
            at.become_ready("m")
        with pytest.raises(WorkerLost):
            await task

    run(scenario())


def test_with_all_but_one_given_up_the_service_serves_on():
    async def scenario():
        service, workers = pair()
        dead = service.replicas[0]
        die(service, workers[0])
        dead.failure = WorkerFailed("5 workers in a row ended")
        service.gave_up(dead)
        assert service.ready
        assert service.alive
        assert not service.failed.is_set()
        assert dead.status == "failed"
        await submit(service, make_job("a"))
        assert jobs_of(workers[1]) == ["a"]

    run(scenario())


def test_the_service_fails_when_every_replica_has_given_up():
    async def scenario():
        service, workers = pair()
        (task,) = await submit(service, make_job("a"))
        for worker in workers:
            die(service, worker)
            worker.replica.failure = WorkerFailed("5 workers in a row ended")
            service.gave_up(worker.replica)
        assert service.failed.is_set()
        with pytest.raises(Unavailable):
            await task

    run(scenario())


def test_a_device_that_is_missing_at_the_start_ends_the_service_although_others_are_ready():
    async def scenario():
        service = supervisor(device="cpu", replicas="2")
        Worker(service, replica=0).become_ready("m")
        missing = Worker(service, replica=1)
        with pytest.raises(WorkerFailed) as error:
            missing.say(Fatal("device is cuda:7, but the number of CUDA devices is 1", wrong_setting=True))
        missing.replica.failure = error.value
        service.gave_up(missing.replica)
        assert service.failure.wrong_setting

    run(scenario())


@pytest.fixture(scope="module")
def two(start_server):
    """A server with two replicas."""
    with start_server(LDM_REPLICAS="2", LDM_DEVICE="cpu", LDM_INVARIANT="1", LDM_BUCKETS="8") as server:
        wait_until(lambda: all(one["status"] == "ok" for one in server.health()["replicas"]))
        yield server


def files(answers: Iterable[httpx.Response]) -> list[str]:
    """The files of all images, in base64."""
    return [image["data"] for answer in answers for image in answer.json()["images"]]


def test_replicas_share_the_requests_and_give_the_bytes_of_one(two):
    bodies = [{"prompt": "p", "steps": 30, "seed": seed} for seed in range(4)]
    expected = files(post(two, body) for body in bodies)
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [future.result() for future in together(two, pool, bodies)]
    assert files(answers) == expected
    calls = two.client.get("/activity").json()["calls"]
    assert {call["replica"] for call in calls} == {0, 1}


def test_a_replica_that_is_killed_under_load_loses_no_request_and_the_service_stays_ready(two):
    bodies = [{"prompt": "p", "steps": 120, "seed": seed} for seed in range(4)]
    expected = files(post(two, body) for body in bodies)
    restarts = two.metric("ldm_worker_restarts_total", replica="0")
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = together(two, pool, bodies)
        wait_for_running(two, len(bodies))
        two.kill_worker()
        assert two.is_ready
        assert files([future.result() for future in answers]) == expected
    assert sum(two.metric("ldm_worker_restarts_total", replica=one) for one in "01") == restarts + 1

"""The backend of an API replica: jobs that lose their engine replica, cancelled jobs, the end of the service.

The handle of Ray Serve is a fake that plays prepared answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from service.cluster import backend as module
from service.cluster.backend import MAX_LOSSES, ClusterBackend
from service.cluster.engine import PROGRESS_SECONDS, paced
from service.engine.events import Done, Previewed
from service.engine.job import Job
from service.errors import Draining, JobFailed, Loading, OutOfMemory, ServiceError, Unavailable, WorkerLost
from service.metrics import Metrics
from service.settings import Settings
from service.worker.progress import Progress, State
from tests.helpers.fake_runner import make_job
from tests.helpers.supervisors import run

DONE = Done("a", (b"rgb",), (), 0.0, 0.0, 0.0)
RUNNING = State(stage="running", step=3, steps=9)
DIED = ActorDiedError()


class FakeEngines:
    """Plays one script for each call of run(): what the replica yields, raises, or waits for.

    calls: the jobs that were sent; cancelled: how many calls were cancelled.
    """

    def __init__(self, *scripts: list[object]) -> None:
        self.scripts = list(scripts)
        self.calls: list[Job] = []
        self.cancelled = 0

    def options(self, **_: object) -> FakeEngines:
        return self

    def remote(self, sent: Job) -> FakeAnswers:
        self.calls.append(sent)
        return FakeAnswers(self, self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0])


class FakeAnswers:
    def __init__(self, engines: FakeEngines, script: list[object]) -> None:
        self.engines, self.script = engines, iter(script)

    def cancel(self) -> None:
        self.engines.cancelled += 1

    def __aiter__(self) -> FakeAnswers:
        return self

    async def __anext__(self) -> object:
        answer = next(self.script, None)
        if answer is None:
            raise StopAsyncIteration
        if isinstance(answer, asyncio.Event):
            await answer.wait()
        if isinstance(answer, Exception) and not isinstance(answer, ServiceError):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)


def backend(*scripts: list[object], **settings: object) -> ClusterBackend:
    made = ClusterBackend(Settings(**settings), Metrics(), FakeEngines(*scripts))
    made.models.known = True
    return made


async def outcome_of(made: ClusterBackend, progress: Progress | None = None) -> Done | ServiceError:
    try:
        return await made.run(make_job("a"), progress)
    except ServiceError as error:
        return error


@pytest.mark.parametrize(
    "loss", [[DIED], [RUNNING, DIED], [RUNNING], [Unavailable()]], ids=["died", "later", "ended", "no worker"]
)
def test_a_job_that_loses_its_replica_is_sent_again(loss):
    async def scenario() -> None:
        made, progress = backend(loss, [State(), RUNNING, DONE]), Progress()
        assert await outcome_of(made, progress) == DONE
        assert [sent.id for sent in made._engines.calls] == ["a", "a"]
        assert (progress.state.stage, progress.state.step, made.running) == ("done", 3, 0)

    run(scenario())


def test_a_job_that_had_started_at_ten_lost_replicas_is_refused():
    async def scenario() -> None:
        made = backend([RUNNING, DIED])
        assert isinstance(await outcome_of(made), WorkerLost)
        assert len(made._engines.calls) == MAX_LOSSES

    run(scenario())


def test_errors_of_a_job_are_its_answer():
    async def scenario() -> None:
        assert isinstance(await outcome_of(backend([OutOfMemory()])), OutOfMemory)
        assert isinstance(await outcome_of(backend([RUNNING, JobFailed()])), JobFailed)
        bug = RayTaskError("run", "traceback", ValueError("a bug"))
        assert type(await outcome_of(backend([bug]))) is ServiceError

    run(scenario())


def test_cancelling_reaches_the_replica():
    async def scenario() -> None:
        made = backend([RUNNING, asyncio.Event()])
        task = asyncio.create_task(made.run(make_job("a")))
        await until(lambda: made.running == 1)
        task.cancel()
        await asyncio.wait({task})
        assert (task.cancelled(), made._engines.cancelled, made.running) == (True, 1, 0)
        assert made.metrics.cancelled.labels("running")._value.get() == 1

    run(scenario())


def test_at_the_end_open_jobs_finish_and_late_ones_are_refused():
    async def scenario() -> None:
        made = backend([RUNNING, asyncio.Event()], drain_seconds=0.05)
        with made.reserve_slot():
            task = asyncio.create_task(outcome_of(made))
            await until(lambda: made.running == 1)
            await made.drain()
            assert isinstance(await task, Draining)
        with pytest.raises(Draining), made.reserve_slot():
            pass

    run(scenario())


def test_requests_wait_until_the_first_replica_has_reported():
    made = ClusterBackend(Settings(), Metrics(), FakeEngines([]))
    with pytest.raises(Loading):
        made.check_open()
    assert not made.ready


def test_steps_alone_are_shown_at_intervals_and_everything_else_at_once():
    async def scenario() -> None:
        progress, answer = Progress(), asyncio.get_running_loop().create_future()
        work = asyncio.ensure_future(answer)
        shown: list[tuple[str, int, bool]] = []

        async def collect() -> None:
            async for state in paced(progress, work):
                shown.append((state.stage, state.step, state.preview is not None))

        collecting = asyncio.create_task(collect())
        await asyncio.sleep(0)
        progress.start(100)
        await until(lambda: shown == [("running", 0, False)])
        for step in range(1, 50):
            progress.advance(step)
            await asyncio.sleep(0)
        await until(lambda: len(shown) == 2)
        assert shown[1] == ("running", 49, False)
        progress.show(Previewed("a", 0, 49, 1, 1, b"rgb"))
        await until(lambda: len(shown) == 3)
        answer.set_result(None)
        progress.end("done")
        await asyncio.wait_for(collecting, PROGRESS_SECONDS * 40)
        assert shown[2:] == [("running", 49, True)]

    run(scenario())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)

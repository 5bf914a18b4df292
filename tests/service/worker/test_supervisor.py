"""Slots of the queue, jobs, and workers that fail; no model is loaded here."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.engine.events import Failed, Previewed, QueuePosition, QueuePositions
from service.errors import Draining, JobFailed, Loading, NotFound, QueueFull, ServiceError, Unavailable
from service.settings import Settings
from service.worker import child
from service.worker.child import WorkerProcess
from service.worker.progress import Progress, State
from service.worker.protocol import MAGIC, PREFIX, Heartbeat, Ready, Rejected, encode
from service.worker.replica import WorkerFailed
from service.worker.supervisor import Supervisor
from tests.helpers.fake_runner import make_job
from tests.helpers.supervisors import Worker, run, supervisor


def framed(text: bytes) -> bytes:
    return PREFIX.pack(MAGIC, len(text), 0) + text


BABBLE = "import os, sys; os.write(int(sys.argv[1]), bytes((0, 0, 0, 2, 0, 0, 0, 0)) + b'{}')"


async def ask(supervisor: Supervisor) -> Exception | None:
    """A request for one job; returns the error that it gets."""
    try:
        with supervisor.reserve_slot():
            await supervisor.run(make_job(str(id(object()))))
    except ServiceError as error:
        return error
    return None


def test_no_slot_before_a_model_is_known():
    async def scenario():
        with pytest.raises(Loading), supervisor(specs=False).reserve_slot():
            pass

    run(scenario())


def test_the_queue_has_its_number_of_slots_and_a_failure_frees_its_slot():
    async def scenario():
        full = supervisor(queue_size=2)
        with full.reserve_slot(), suppress(KeyError), full.reserve_slot():
            with pytest.raises(QueueFull) as refused, full.reserve_slot():
                pass
            assert refused.value.retry_after > 0
            raise KeyError
        assert full.slots_in_use == 0

    run(scenario())


def test_a_cancelled_request_leaves_nothing_behind():
    async def scenario():
        service = supervisor()
        request = asyncio.create_task(ask(service))
        await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait({request})
        assert (service.slots_in_use, service.running) == (0, 0)
        await service.drain()

    run(scenario())


def test_jobs_that_outlast_the_drain_are_refused_and_so_are_later_ones():
    async def scenario():
        service = supervisor(drain_seconds=0)
        early = asyncio.create_task(ask(service))
        await asyncio.sleep(0)
        with service.reserve_slot():  # taken in time, its job comes too late
            await service.drain()
            with pytest.raises(Draining):
                await service.run(make_job("late"))
        assert isinstance(await early, Draining)
        assert isinstance(await ask(service), Draining)

    run(scenario())


async def submitted(service: Supervisor, progress: Progress) -> tuple[asyncio.Task, Worker]:
    """Job "a", submitted and not yet started."""
    task = asyncio.create_task(service.run(make_job("a"), progress))
    await asyncio.sleep(0)
    return task, Worker(service)


def test_progress_never_goes_backwards():
    async def scenario():
        service, progress = supervisor(), Progress()
        task, worker = await submitted(service, progress)
        worker.say(QueuePositions((QueuePosition("a", 2, 7.5), QueuePosition("gone", 3, None))))
        assert progress.state == State("queued", 2, 7.5)
        worker.start(5)
        worker.step(4)
        worker.preview(4)
        before = progress.state
        assert before == State("running", None, None, 4, 5, Previewed("a", 0, 4, 1, 1, b"rgb"))
        service.requeue(service.replicas[0], "kill", 1.0)  # its worker died; the next repeats what was done
        worker.say(QueuePositions((QueuePosition("a", 1, 3.0),)))
        worker.start(5)
        worker.step(3)
        worker.preview(2)
        assert progress.state is before
        worker.step(5)
        assert progress.state.step == 5
        worker.say(Failed("a", "out_of_memory"))
        with suppress(ServiceError):
            await task
        assert progress.state.stage == "failed"

    run(scenario())


def test_a_slow_watcher_sees_only_the_newest_state():
    async def scenario():
        service = supervisor()
        with pytest.raises(NotFound):
            service.watch("a")
        task, worker = await submitted(service, Progress())
        states = service.watch("a")
        assert (await anext(states)).stage == "queued"
        worker.start(5)
        for step in range(1, 6):
            worker.step(step)
        assert (await anext(states)).step == 5
        task.cancel()
        assert [state.stage async for state in states] == ["cancelled"]

    run(scenario())


def test_cancelled_jobs_are_counted_by_stage():
    async def scenario():
        service = supervisor()
        for stage in ("queued", "running"):
            task, worker = await submitted(service, Progress())
            if stage == "running":
                worker.start(5)
            task.cancel()
            await asyncio.wait({task})
        for stage in ("queued", "running"):
            assert service.metrics.registry.get_sample_value("ldm_cancelled_total", {"stage": stage}) == 1

    run(scenario())


@pytest.mark.slow
def test_a_worker_that_cannot_start_or_be_read_is_replaced_until_one_reports_a_fatal_error(monkeypatch):
    starts = []

    async def spawn(settings: Settings, replica: int) -> WorkerProcess:
        starts.append(settings)
        if len(starts) == 1:
            raise OSError("no memory for a process")
        if len(starts) == 3:
            raise WorkerFailed("no such model")
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", BABBLE, str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        return WorkerProcess(process, *await asyncio.open_unix_connection(sock=ours))

    async def scenario():
        service = supervisor()
        async with service.supervise():
            waiting = asyncio.create_task(ask(service))
            await service.failed.wait()
            assert isinstance(await waiting, Unavailable)
            assert isinstance(await ask(service), Unavailable)
            assert not service.alive
            assert "no such model" in str(service.failure)

    monkeypatch.setattr(child, "spawn", spawn)
    run(scenario())
    assert len(starts) == 3


def test_jobs_are_refused_when_no_worker_survives_its_start(monkeypatch):
    async def spawn(settings: Settings, replica: int) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(["sh", "-c", "kill -9 $$"], pass_fds=[theirs.fileno()])
        return WorkerProcess(process, *await asyncio.open_unix_connection(sock=ours))

    async def scenario():
        service = supervisor()
        async with service.supervise():
            assert isinstance(await ask(service), Unavailable)
            assert service.failure is None, "the next worker may survive"

    monkeypatch.setattr(child, "spawn", spawn)
    run(scenario())


@pytest.mark.slow
def test_a_missing_model_ends_the_service_with_its_name(tmp_path: Path):
    async def scenario():
        service = supervisor(specs=False, model=(str(tmp_path / "nothing"),))
        async with service.supervise():
            await service.failed.wait()
        assert "nothing" in str(service.failure)

    run(scenario())


def test_a_worker_that_loads_a_model_has_more_time_before_it_counts_as_stalled():
    now = [0.0]
    worker = WorkerProcess(None, None, None, clock=lambda: now[0])

    def stalled_at(seconds: float, loading: bool) -> bool:
        """Whether it has stalled, at a limit of 10 s, when it sends a heartbeat without progress."""
        now[0] = worker.last_message = seconds
        worker.beat(Heartbeat(ticks=3, busy=True, loading=loading, memory=5))
        return worker.is_stalled(10)

    worker.become_ready()
    assert not stalled_at(1, loading=False)
    assert stalled_at(12, loading=False)
    assert not stalled_at(13, loading=True)
    assert not stalled_at(100, loading=True)
    assert not stalled_at(101, loading=False)
    assert stalled_at(112, loading=False)


def test_a_worker_that_sends_nothing_has_stalled():
    now = [0.0]
    worker = WorkerProcess(None, None, None, clock=lambda: now[0])
    worker.become_ready()
    now[0] = 9.9
    assert not worker.is_stalled(10)
    now[0] = 10.1
    assert worker.is_stalled(10)


def test_a_worker_that_starts_slowly_has_more_time_before_its_first_message():
    now = [0.0]
    worker = WorkerProcess(None, None, None, clock=lambda: now[0])
    now[0] = 99.0
    assert not worker.is_stalled(10)
    now[0] = 100.1
    assert worker.is_stalled(10)


def test_a_start_and_heartbeats_are_measured():
    service = supervisor()
    worker = Worker(service)
    worker.say(Ready(holds=(), device="cpu", memory=9, parts=(("imports", 0.5),)))
    worker.say(Heartbeat(ticks=3, busy=True, loading=False, memory=5))
    value = service.metrics.registry.get_sample_value
    assert [
        value("ldm_device_memory_bytes", {"kind": kind, "replica": "0"}) for kind in ("used", "total")
    ] == [5, 9]
    assert value("ldm_start_seconds", {"part": "imports", "replica": "0"}) == 0.5


def test_an_unreadable_message_is_counted_and_fails_the_job_that_it_may_have_ended():
    async def scenario():
        service = supervisor()
        task, worker = await submitted(service, Progress())
        worker.process.reader = reader = asyncio.StreamReader()
        for kind in ("Previewed", "Done"):
            reader.feed_data(framed(json.dumps([kind, "a", ["rubbish"], []]).encode()))
        reader.feed_data(encode(Heartbeat(ticks=1, busy=True, loading=False, memory=7)))
        reader.feed_eof()
        await worker.replica.listen()
        with pytest.raises(JobFailed):
            await task
        value = service.metrics.registry.get_sample_value
        assert value("ldm_unreadable_messages_total") == 2
        assert value("ldm_device_memory_bytes", {"kind": "used", "replica": "0"}) == 7

    run(scenario())


def test_a_message_that_the_worker_cannot_read_fails_its_job():
    async def scenario():
        service = supervisor()
        task, worker = await submitted(service, Progress())
        worker.say(Rejected(None, "rubbish"))
        worker.say(Rejected("a", "rubbish"))
        with pytest.raises(JobFailed):
            await task

    run(scenario())


@pytest.mark.parametrize(
    ("code", "cause"),
    [(-signal.SIGKILL, "kill"), (-signal.SIGTERM, "kill"), (-signal.SIGSEGV, "crash"), (1, "crash")],
)
def test_a_signal_from_elsewhere_is_a_kill_and_every_other_end_a_crash(code, cause):
    assert WorkerProcess(SimpleNamespace(returncode=code), None, None).cause_of_end() == cause


def test_a_kill_that_the_kernel_counts_as_out_of_memory_is_a_crash(monkeypatch):
    counts = iter((3, 3, 4))
    monkeypatch.setattr(child, "count_oom_kills", lambda: next(counts))
    worker = WorkerProcess(SimpleNamespace(returncode=-signal.SIGKILL), None, None)
    worker.beat(Heartbeat(ticks=1, busy=True, loading=False, memory=7))
    assert worker.cause_of_end() == "crash"

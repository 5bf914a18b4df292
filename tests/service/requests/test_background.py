"""The jobs API: over HTTP, and without HTTP on a supervisor with a fake worker."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest
from PIL import Image

from service.engine.events import Done, Failed, Previewed, QueuePosition, QueuePositions
from service.errors import ClientGone, InvalidRequest, NotFound, QueueFull, ServiceError
from service.keys.client import ANYBODY
from service.requests import job_record as module
from service.requests.background import Jobs, Submission
from service.requests.job_record import Record
from service.requests.job_schemas import GenerateJob
from service.requests.response import Result
from tests.checkpoints.tiny import tiny_spec
from tests.helpers.clients import LONG, error_of, wait_for_jobs
from tests.helpers.images import base64_of, noise
from tests.helpers.servers import QUEUE_SIZE, Server, wait_until
from tests.helpers.supervisors import Worker, caller, run, supervisor

PIXELS = bytes(64 * 64 * 3)


def body(steps: int = 5, **changes) -> GenerateJob:
    request = {"prompt": "p", "seed": 1, "steps": steps}
    return GenerateJob.model_validate({"task": "generate", "request": request} | changes)


class Service:
    """Jobs on a supervisor whose worker is a fake that sends the test's messages."""

    def __init__(self, **settings) -> None:
        self.supervisor = supervisor(**settings)
        self.supervisor.models.specs, self.supervisor.models.known = {"tiny": tiny_spec()}, True
        self.jobs = Jobs(self.supervisor)

    def worker(self, record: Record) -> Worker:
        return Worker(self.supervisor, record.id)

    async def begun(self, **changes) -> Record:
        """A job that the supervisor knows."""
        record = await self.jobs.submit(body(**changes), None, caller())
        await asyncio.sleep(0)
        return record

    async def end(self, record: Record) -> None:
        parts = {"queue": 0.1, "denoise": 0.2, "decode": 0.3}
        self.worker(record).say(Done(record.id, (PIXELS,), ("w",), **parts))
        await asyncio.wait({record.work})
        await asyncio.sleep(0)  # for the callbacks


def test_a_job_reports_its_position_its_steps_and_its_images():
    async def scenario():
        service = Service()
        record = await service.begun()
        service.worker(record).say(QueuePositions((QueuePosition(record.id, 2, 7.5),)))
        status = await record.describe()
        assert (status.status, status.position, status.estimate) == ("queued", 2, 7.5)
        service.worker(record).start(5)
        service.worker(record).step(3)
        status = await record.describe()
        assert (status.status, status.step, status.steps, status.position) == ("running", 3, 5, None)
        assert status.result is None
        await service.end(record)
        status = await record.describe()
        assert (status.status, status.result.warnings, len(status.result.images)) == ("done", ["w"], 1)
        assert service.supervisor.slots_in_use == 0
        assert await service.jobs.find(record.id, ANYBODY) is record

    run(scenario())


def test_events_are_the_current_state_then_every_change_then_the_end(monkeypatch):
    monkeypatch.setattr(module, "KEEP_ALIVE_SECONDS", 0.01)

    async def scenario():
        service = Service()
        record = await service.begun(preview_every=2)
        events = record.events()

        async def next_event() -> tuple:
            while (event := await anext(events)) is None:
                pass
            return event

        assert (await next_event()).name == "queued"
        assert await anext(events) is None  # a keep-alive
        worker = service.worker(record)
        worker.start(5)
        worker.step(1)
        worker.step(2)  # not read in between: merged
        _, name, status = await next_event()
        assert (name, status.step, status.steps) == ("step", 2, 5)
        worker.say(Previewed(record.id, index=0, step=2, width=2, height=2, pixels=bytes(12)))
        number, name, preview = await next_event()
        assert (name, preview.step, preview.width, preview.media_type) == ("preview", 2, 2, "image/jpeg")
        assert (await anext(record.events())).name == "preview"  # a new reader gets the current state
        assert await anext(record.events(seen=number)) is None  # one that has it does not
        await service.end(record)
        number, name, status = await next_event()
        assert (name, len(status.result.images)) == ("done", 1)
        assert [event async for event in record.events() if event] == [(number, name, status)]

    run(scenario())


def test_a_failed_job_has_an_error():
    async def scenario():
        service = Service()
        record = await service.begun()
        service.worker(record).say(Failed(record.id, "out_of_memory"))
        await asyncio.wait({record.work})
        status = await record.describe()
        assert (status.status, status.error.code, status.error.request_id) == ("failed", "out_of_memory", "r")
        late = await service.begun(request={"prompt": "p", "timeout": 0.01})
        await asyncio.wait({late.work})
        assert (await late.describe()).error.code == "deadline_exceeded"
        assert service.supervisor.slots_in_use == 0

    run(scenario())


def test_cancelling_frees_the_slot_at_any_time():
    async def scenario():
        service = Service()
        at_once = await service.jobs.submit(body(), None, caller())  # before its task has begun
        await at_once.cancel()
        queued = await service.begun()
        await queued.cancel()
        running = await service.begun()
        service.worker(running).start(5)
        await running.cancel()
        await asyncio.sleep(0)
        assert [record.status for record in (at_once, queued, running)] == ["cancelled"] * 3
        assert service.supervisor.slots_in_use == 0
        done = await service.begun()
        await service.end(done)
        await done.cancel()
        assert done.status == "done"

    run(scenario())


def test_an_idempotency_key_starts_one_job_and_rejects_another_body():
    async def scenario():
        service = Service()
        ask = service.jobs.submit
        first, twin = await asyncio.gather(ask(body(), "key", caller()), ask(body(), "key", caller()))
        assert first is twin
        assert await ask(body(), "key", caller()) is first
        assert await ask(body(), "other key", caller()) is not first
        with pytest.raises(InvalidRequest, match="Idempotency-Key"):
            await ask(body(steps=6), "key", caller())

    run(scenario())


def test_the_key_of_a_rejected_request_can_be_used_again():
    async def scenario():
        service = Service(queue_size=1)
        first = await service.begun()
        with pytest.raises(QueueFull):
            await service.jobs.submit(body(), "key", caller())
        await first.cancel()
        with pytest.raises(ServiceError):
            await service.jobs.submit(body(request={"prompt": "p", "sampler": "none"}), "key", caller())
        assert (await service.jobs.submit(body(), "key", caller())).status == "queued"

    run(scenario())


def test_ended_jobs_are_kept_up_to_a_count_a_size_and_an_age():
    async def scenario():
        service = Service(jobs_kept=2)
        records = [await service.begun() for _ in range(3)]
        for record in records:
            await service.end(record)
        with pytest.raises(NotFound):
            await service.jobs.find(records[0].id, ANYBODY)
        assert [await service.jobs.find(record.id, ANYBODY) for record in records[1:]] == records[1:]
        small = Service(jobs_bytes=1)
        records = [await small.begun() for _ in range(2)]
        for record in records:
            await small.end(record)
            assert await small.jobs.find(record.id, ANYBODY) is record  # the newest stays, however large
        with pytest.raises(NotFound):
            await small.jobs.find(records[0].id, ANYBODY)
        brief = Service(jobs_seconds=0.05)
        record = await brief.begun()
        await brief.end(record)
        await asyncio.sleep(0.2)
        with pytest.raises(NotFound):
            await brief.jobs.find(record.id, ANYBODY)

    run(scenario())


def ask(server: Server, request: dict, task: str = "generate", **more) -> httpx.Response:
    headers = more.pop("headers", {})
    return server.client.post("/jobs", json={"task": task, "request": request, **more}, headers=headers)


def events_of(answer: httpx.Response) -> Iterator[tuple[str, dict]]:
    """(name, data) of a stream."""
    for _, name, data in numbered_events_of(answer):
        yield name, data


def numbered_events_of(answer: httpx.Response) -> Iterator[tuple[int, str, dict]]:
    """(id, name, data) of a stream."""
    fields = {}
    for line in answer.iter_lines():
        field, _, value = line.partition(": ")
        fields[field] = value
        if field == "data":
            yield int(fields["id"]), fields["event"], json.loads(value)


@pytest.mark.everywhere
def test_a_job_makes_the_same_image_as_generate(server):
    request = {"prompt": "red apple", "seed": 4}
    accepted = ask(server, request)
    assert accepted.status_code == 202
    path = accepted.headers["location"]
    assert path == f"/jobs/{accepted.json()['id']}"
    wait_until(lambda: server.client.get(path).json()["status"] == "done")
    made = server.client.get(path).json()["result"]
    assert made["images"] == server.client.post("/generate", json=request).json()["images"]
    with server.client.stream("GET", path + "/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert [name for name, _ in events_of(answer)] == ["done"]


@pytest.mark.everywhere
def test_a_running_job_is_followed_and_cancelled_over_http(server):
    path = ask(server, LONG).headers["location"]
    for _ in range(2):  # who comes back goes on where the job is
        with server.client.stream("GET", path + "/events") as answer:
            name, data = next(event for event in events_of(answer) if event[0] == "step")
            assert data["steps"] == 1000
            assert data["status"] == "running"
    with server.client.stream("GET", path + "/events") as answer:
        assert server.client.delete(path).json()["status"] == "cancelled"
        name, data = list(events_of(answer))[-1]
        assert (name, data["status"]) == ("cancelled", "cancelled")
    wait_for_jobs(server, 0)
    assert server.client.delete(path).json()["status"] == "cancelled"
    assert server.client.get(path).json()["result"] is None


@pytest.mark.everywhere
def test_a_stream_continues_after_last_event_id(server):
    path = ask(server, LONG).headers["location"]
    with server.client.stream("GET", path + "/events") as answer:
        number, _, data = next(event for event in numbered_events_of(answer) if event[1] == "step")
    headers = {"Last-Event-ID": str(number)}
    with server.client.stream("GET", path + "/events", headers=headers) as answer:
        later, name, status = next(numbered_events_of(answer))
    assert (name, later > number, status["step"] > data["step"]) == ("step", True, True)
    server.client.delete(path)
    with server.client.stream("GET", path + "/events", headers={"Last-Event-ID": "nonsense"}) as answer:
        assert [name for _, name, _ in numbered_events_of(answer)] == ["cancelled"]
    wait_for_jobs(server, 0)


@pytest.mark.everywhere
def test_a_job_shows_previews_while_it_runs(server):
    path = ask(server, LONG | {"n": 2}, preview_every=10).headers["location"]
    with server.client.stream("GET", path + "/events") as answer:
        data = next(data for name, data in events_of(answer) if name == "preview")
    assert data["step"] % 10 == 0
    opened = Image.open(io.BytesIO(base64.b64decode(data["data"])))
    assert (opened.format, opened.size) == ("JPEG", (data["width"], data["height"]))
    server.client.delete(path)
    wait_for_jobs(server, 0)


@pytest.mark.everywhere
def test_a_waiting_job_reports_its_position(server):
    whole_calls = LONG | {"n": 16}
    paths = [ask(server, whole_calls).headers["location"] for _ in range(3)]
    for path, position in zip(paths[1:], (1, 2), strict=True):
        wait_until(
            lambda path=path, position=position: server.client.get(path).json()["position"] == position
        )
    assert server.client.get(paths[2]).json()["status"] == "queued"
    for path in paths:
        server.client.delete(path)
    wait_for_jobs(server, 0)


@pytest.mark.everywhere
def test_a_job_can_inpaint(server):
    request = {"image": base64_of(noise(20, 20)), "mask": base64_of(Image.new("L", (20, 20), 255))}
    path = ask(server, request, "inpaint").headers["location"]
    wait_until(lambda: server.client.get(path).json()["status"] == "done")
    assert server.client.get(path).json()["result"]["images"][0]["width"] == 20


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ({"task": "generate", "request": {"prompt": "p", "steps": 0}}, "request.steps"),
        ({"task": "generate", "request": {"prompt": "p", "generate": 1}}, "request.generate"),
        ({"task": "generate", "request": {"prompt": "p", "init_image": "?"}}, "request.init_image"),
        ({"task": "inpaint", "request": {"prompt": "p", "mask": "?"}}, "request.image"),
        ({"task": "paint", "request": {}}, "task"),
        ({"request": {}}, "task"),
        ({"task": "generate"}, "request"),
    ],
)
@pytest.mark.everywhere
def test_an_invalid_job_is_rejected_with_the_name_of_the_field(server, content, param):
    error = error_of(server.client.post("/jobs", json=content), 422)
    assert error["param"] == param
    assert error["message"].startswith(param)


@pytest.mark.everywhere
def test_unknown_jobs_are_404_and_jobs_belong_to_an_api_key(server):
    for method, path in (("GET", "/jobs/no"), ("GET", "/jobs/no/events"), ("DELETE", "/jobs/no")):
        assert error_of(server.client.request(method, path), 404)["code"] == "not_found"
    headers = {"Idempotency-Key": f"key {time.time()}"}
    first, again = (ask(server, {"prompt": "p"}, headers=headers) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    error = error_of(ask(server, {"prompt": "q"}, headers=headers), 422)
    assert error["param"] == "Idempotency-Key"
    other = ask(server, {"prompt": "q"}, headers=headers | {"X-API-Key": "of somebody else"})
    assert other.json()["id"] != first.json()["id"]
    wait_for_jobs(server, 0)


@pytest.mark.everywhere
def test_jobs_share_the_queue_with_requests(server):
    with ExitStack() as cleanup:
        for _ in range(QUEUE_SIZE):
            path = ask(server, LONG).headers["location"]
            cleanup.callback(server.client.delete, path)
        assert error_of(ask(server, LONG), 429)["code"] == "queue_full"
        assert error_of(server.client.post("/generate", json={"prompt": "p"}), 429)
        last = server.client.get(path).json()
        assert (last["status"], last["position"] or 1) >= ("queued", 1)
    wait_for_jobs(server, 0)


def test_a_slot_is_held_from_before_images_are_read_until_files_are_encoded():
    async def scenario():
        service = Service(queue_size=1)
        taken = []

        def prepare() -> Submission:
            taken.append(service.supervisor.slots_in_use)
            return Submission(body().request, encode=encode)

        def encode(result: Result, index: int) -> bytes:
            taken.append(service.supervisor.slots_in_use)
            return b"file"

        answer = asyncio.create_task(service.jobs.run(prepare, caller()))
        await until(lambda: service.supervisor._tickets)
        with pytest.raises(QueueFull):
            await service.jobs.run(prepare, caller())
        (job,) = service.supervisor._tickets
        Worker(service.supervisor, job).say(Done(job, (PIXELS,), (), 0.1, 0.2, 0.3))
        assert (await answer).files == (b"file",)
        assert taken == [1, 1]
        await asyncio.sleep(0)
        assert service.supervisor.slots_in_use == 0
        with pytest.raises(NotFound):
            await service.jobs.find(job, ANYBODY)

    run(scenario())


def test_a_client_whose_images_take_long_to_read_holds_up_no_other():
    async def scenario():
        service, release = Service(), threading.Event()

        def slow() -> Submission:
            release.wait(60)
            return Submission(body().request)

        flood = [asyncio.create_task(service.jobs.run(slow, caller("A"))) for _ in range(20)]
        await until(lambda: service.supervisor.slots_in_use == 20)
        flood[0].cancel()  # a client that leaves does not get another thread before its first one ends
        other = asyncio.create_task(service.jobs.run(lambda: Submission(body().request), caller("B")))
        await asyncio.wait_for(until(lambda: service.supervisor._tickets), 30)  # the job of B
        release.set()
        for task in (*flood, other):
            task.cancel()

    run(scenario())


def test_a_caller_that_stops_waiting_cancels_its_job():
    async def scenario():
        service = Service()
        waiting = asyncio.create_task(service.jobs.run(lambda: Submission(body().request), caller()))
        await until(lambda: service.supervisor._tickets)
        waiting.cancel()
        await until(lambda: not service.supervisor._tickets)
        assert service.supervisor.slots_in_use == 0

    run(scenario())


def test_cancelling_a_job_ends_the_request_that_waits_for_it():
    async def scenario():
        service = Service()
        waiting = asyncio.create_task(service.jobs.run(lambda: Submission(body().request), caller()))
        await until(lambda: service.supervisor._tickets)
        (job,) = service.supervisor._tickets
        await (await service.jobs.find(job, ANYBODY)).cancel()
        with pytest.raises(ClientGone):
            await waiting

    run(scenario())


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.001)

"""Two server processes with one Redis: each answers for the jobs of the other, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.helpers.clients import LONG, post
from tests.helpers.redis_servers import RedisServer, redis_server
from tests.helpers.servers import Server, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def redis(tmp_path_factory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def servers(start_server, redis) -> Iterator[tuple[Server, Server]]:
    with start_server(LDM_JOB_STORE=redis.url) as one, start_server(LDM_JOB_STORE=redis.url) as two:
        yield one, two


def ask(server: Server, request: dict, key: str | None = None) -> httpx.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return server.client.post("/jobs", json={"task": "generate", "request": request}, headers=headers)


def events(server: Server, path: str, last: int | None = None) -> Iterator[tuple[int, str, dict]]:
    """(id, name, data) of a job's events."""
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    with server.client.stream("GET", path + "/events", headers=headers) as answer:
        fields = {}
        for line in answer.iter_lines():
            name, _, fields[name] = line.partition(": ")
            if name == "data":
                yield int(fields["id"]), fields["event"], json.loads(fields["data"])


def test_a_job_is_watched_and_fetched_at_the_other_server(servers):
    one, two = servers
    accepted = ask(one, {"prompt": "p", "steps": 200, "seed": 3}, "key")
    assert accepted.status_code == 202
    path = accepted.headers["location"]
    number, _, _ = next(event for event in events(two, path) if event[2]["step"] > 0)
    later = list(events(two, path, number))
    numbers = [event[0] for event in later]
    assert numbers == sorted(numbers)
    assert numbers[0] > number
    assert later[-1][1] == "done"
    here, there = (server.client.get(path).json() for server in servers)
    assert here == there == later[-1][2]
    assert ask(two, {"prompt": "p", "steps": 200, "seed": 3}, "key").json()["id"] == here["id"]


def test_a_job_is_cancelled_at_the_other_server(servers):
    one, two = servers
    path = ask(one, LONG).headers["location"]
    assert two.client.delete(path).json()["status"] == "cancelled"
    assert one.client.get(path).json()["status"] == "cancelled"
    wait_until(lambda: one.health()["jobs"] == 0)


def test_without_redis_only_new_jobs_are_refused(servers, redis):
    one, two = servers
    path = ask(one, {"prompt": "p", "steps": 300}).headers["location"]
    redis.stop()
    refused = ask(two, {"prompt": "p"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "unavailable"
    assert int(refused.headers["retry-after"]) > 0
    assert two.client.get(path).status_code == 503
    assert post(two, {"prompt": "p", "steps": 2}).status_code == 200
    assert two.is_ready
    wait_until(lambda: one.client.get(path).json()["status"] == "done")
    redis.start()
    wait_until(lambda: two.client.get(path).json().get("status") == "done")
    assert ask(two, {"prompt": "p", "steps": 2}).status_code == 202

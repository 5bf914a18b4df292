"""Jobs belong to the key that made them: other keys cannot read, watch or cancel them; admin keys can."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from service.keys.table import digest
from tests.helpers.servers import Server, wait_until

pytestmark = pytest.mark.slow

LONG = {"prompt": "p", "steps": 1000, "sampler": "ddim"}
TABLE = "".join(
    f'[keys.{name}]\nsha256 = "{digest(f"key-of-{name}".encode()).hex()}"\n{more}\n'
    for name, more in (
        ("alice", ""),
        ("bob", ""),
        ("root", "admin = true"),
        ("two", "running_jobs = 2"),
        ("few", "images_per_hour = 3"),
    )
)


def as_key(name: str) -> dict[str, str]:
    return {"X-API-Key": f"key-of-{name}"}


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory) -> Iterator[Server]:
    table = tmp_path_factory.mktemp("keys") / "keys.toml"
    table.write_text(TABLE)
    with start_server(LDM_KEY_TABLE=str(table), LDM_QUEUE_SIZE="12") as made:
        yield made


@contextmanager
def job(server: Server, name: str, **request: object) -> Iterator[str]:
    """The path of a job of a key; it is cancelled at the end."""
    body = {"task": "generate", "request": {**LONG, **request}}
    made = server.client.post("/jobs", json=body, headers=as_key(name))
    assert made.status_code == 202, made.text
    try:
        yield made.headers["location"]
    finally:
        server.client.delete(made.headers["location"], headers=as_key(name))


CALLS = (("GET", ""), ("GET", "/events"), ("DELETE", ""))


@pytest.mark.parametrize(("method", "end"), CALLS)
def test_another_key_does_not_find_a_job(server, method, end):
    with job(server, "alice") as path:
        answer = server.client.request(method, path + end, headers=as_key("bob"))
        assert answer.status_code == 404
        assert answer.json() | {"error": {}} == {"error": {}}
        unknown = server.client.request(method, "/jobs/none" + end, headers=as_key("bob"))
        assert answer.json()["error"]["message"] == unknown.json()["error"]["message"]
        status = server.client.get(path, headers=as_key("alice")).json()["status"]
        assert status in ("queued", "running")


def test_an_admin_key_reads_watches_and_cancels_the_jobs_of_others(server):
    with job(server, "alice") as path:
        assert server.client.get(path, headers=as_key("root")).json()["status"] in ("queued", "running")
        with server.client.stream("GET", path + "/events", headers=as_key("root")) as events:
            assert next(events.iter_lines()).startswith("id: ")
        assert server.client.delete(path, headers=as_key("root")).json()["status"] == "cancelled"


def test_idempotency_keys_of_different_clients_are_different(server):
    body = {"task": "generate", "request": {"prompt": "p", "steps": 1}}
    made = [
        server.client.post("/jobs", json=body, headers={**as_key(name), "Idempotency-Key": "same"}).json()
        for name in ("alice", "alice", "bob")
    ]
    assert made[0]["id"] == made[1]["id"] != made[2]["id"]


def test_a1111_shows_and_interrupts_only_requests_of_the_same_key(server):
    def ask() -> httpx.Response:
        body = {"prompt": "p", "steps": 1000}
        return httpx.post(
            f"{server.client.base_url}/sdapi/v1/txt2img", json=body, headers=as_key("alice"), timeout=None
        )

    def progress(name: str) -> dict:
        return server.client.get("/sdapi/v1/progress", headers=as_key(name)).json()

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask)
        wait_until(lambda: progress("alice")["state"]["sampling_step"] > 0)
        assert progress("bob")["state"]["job_count"] == 0
        assert progress("bob")["state"]["job"] == ""
        assert progress("root")["state"]["job"] == progress("alice")["state"]["job"] != ""
        for path in ("interrupt", "skip"):
            assert server.client.post(f"/sdapi/v1/{path}", headers=as_key("bob")).status_code == 200
        before = progress("alice")["state"]["sampling_step"]
        wait_until(lambda: progress("alice")["state"]["sampling_step"] > before)
        server.client.post("/sdapi/v1/interrupt", headers=as_key("root"))
        assert len(answer.result().json()["images"]) == 1


def test_the_options_of_a1111_belong_to_the_key(server):
    def chosen(name: str) -> str:
        return server.client.get("/sdapi/v1/options", headers=as_key(name)).json()["samples_format"]

    server.client.post("/sdapi/v1/options", json={"samples_format": "webp"}, headers=as_key("alice"))
    assert (chosen("alice"), chosen("bob"), chosen("root")) == ("webp", "png", "png")


@pytest.mark.parametrize(
    "path",
    [
        "/models/rescan",
        "/models/tiny/load",
        "/models/tiny/unload",
        "/sdapi/v1/refresh-checkpoints",
        "/sdapi/v1/refresh-loras",
        "/sdapi/v1/refresh-embeddings",
        "/sdapi/v1/refresh-vae",
        "/sdapi/v1/unload-checkpoint",
        "/sdapi/v1/reload-checkpoint",
    ],
)
def test_what_changes_the_server_needs_an_admin_key(server, path):
    assert server.client.post(path, headers=as_key("alice")).status_code == 403
    assert server.client.post(path, headers=as_key("root")).status_code == 200


def test_a_key_has_a_limit_of_jobs_at_the_same_time(server):
    with job(server, "two"), job(server, "two") as path:
        body = {"task": "generate", "request": LONG}
        answer = server.client.post("/jobs", json=body, headers=as_key("two"))
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert answer.headers["retry-after"] == "5"
        assert answer.headers["ratelimit-policy"] == '"jobs";q=2;qu="concurrent-requests"'
        assert answer.headers["ratelimit"] == '"jobs";r=0;t=5'
        with job(server, "bob"):  # others are served
            pass
        server.client.delete(path, headers=as_key("two"))
        with job(server, "two"):  # a place is free again
            pass


def test_a_key_has_a_limit_of_images_an_hour(server):
    def ask(n: int) -> httpx.Response:
        return server.client.post(
            "/generate", json={"prompt": "p", "steps": 1, "n": n}, headers=as_key("few")
        )

    assert ask(4).status_code == 422
    assert ask(2).headers["ratelimit"].startswith('"images";r=1;t=')
    refused = ask(2)
    assert refused.status_code == 429
    assert 3000 < int(refused.headers["retry-after"]) <= 3660
    assert ask(1).status_code == 200
    assert server.metric("ldm_key_images_total", key="few") == 3
    assert server.metric("ldm_key_refused_total", key="few", reason="rate_limit_exceeded") == 1


def test_what_a_key_uses_is_counted(server):
    before = {name: server.metric(f"ldm_key_{name}_total", key="bob") for name in ("images", "steps")}
    seconds = server.metric("ldm_key_device_seconds_total", key="bob")
    body = {"prompt": "p", "steps": 7, "n": 2}
    assert server.client.post("/generate", json=body, headers=as_key("bob")).status_code == 200
    assert server.metric("ldm_key_images_total", key="bob") == before["images"] + 2
    assert server.metric("ldm_key_steps_total", key="bob") == before["steps"] + 14
    assert server.metric("ldm_key_device_seconds_total", key="bob") > seconds
    assert "key-of" not in server.client.get("/metrics").text


def test_one_key_cannot_fill_the_queue(server):
    body = {"task": "generate", "request": LONG}
    made = []
    while (answer := server.client.post("/jobs", json=body, headers=as_key("alice"))).status_code == 202:
        made.append(answer.headers["location"])
    try:
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert 5 <= len(made) <= 6  # half of the queue
        small = {"prompt": "p", "steps": 2}
        assert server.client.post("/generate", json=small, headers=as_key("bob")).status_code == 200
    finally:
        for path in made:
            server.client.delete(path, headers=as_key("alice"))

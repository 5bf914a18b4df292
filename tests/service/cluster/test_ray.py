"""What only the Ray application has: replicas that are killed, several API replicas, no replica at first."""

from __future__ import annotations

import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.helpers.clients import LONG, image_of, post, together
from tests.helpers.servers import Server, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def server(ray_servers) -> Server:
    """One API replica and one engine replica."""
    return ray_servers()["server"]


@pytest.fixture
def pair(ray_servers) -> Server:
    """Two API replicas, which share their jobs in Redis, and no engine replica before they needed one."""
    return ray_servers()["pair"]


def process_of(title: str) -> int:
    """The only process with this title."""
    (only,) = [one.pid for one in psutil.process_iter() if title in title_of(one)]
    return only


def title_of(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def fresh(server: Server, method: str, path: str, **more: object) -> httpx.Response:
    """A request on a connection of its own, which any API replica may answer."""
    return httpx.request(method, f"{str(server.client.base_url).rstrip('/')}{path}", timeout=60, **more)


def test_jobs_of_a_killed_engine_replica_run_again_and_give_the_same_images(server):
    bodies = [{"prompt": "p", "seed": seed, "steps": 200} for seed in range(2)]
    alone = [image_of(post(server, body)) for body in bodies]
    with ThreadPoolExecutor() as pool:
        answers = together(server, pool, bodies)
        wait_until(lambda: server.metric("ldm_jobs_running") == 2)
        os.kill(process_of("ServeReplica:server:Engine"), signal.SIGKILL)
        again = [image_of(answer.result()) for answer in answers]
    assert all((one == other).all() for one, other in zip(alone, again, strict=True))


def test_a_client_that_leaves_frees_its_rows_at_the_engine_replica(server):
    wait_until(lambda: server.metric("ldm_replica_jobs") == 0)
    with server.open_request(LONG):
        wait_until(lambda: server.metric("ldm_replica_jobs") == 1)
    wait_until(lambda: server.metric("ldm_replica_jobs") == 0)
    assert server.health()["jobs"] == 0


def test_a_killed_worker_is_replaced_within_its_replica(server):
    engine = process_of("ServeReplica:server:Engine")
    restarts = server.metric("ldm_worker_restarts_total")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(post, server, {"prompt": "p", "steps": 200})
        wait_until(lambda: server.metric("ldm_jobs_running") == 1)
        (worker,) = psutil.Process(engine).children()
        worker.kill()
        assert answer.result().status_code == 200
    assert process_of("ServeReplica:server:Engine") == engine
    wait_until(lambda: server.metric("ldm_worker_restarts_total") == restarts + 1)


def test_every_api_replica_answers_for_a_job(pair):
    body = {"task": "generate", "request": LONG}
    created = [fresh(pair, "POST", "/jobs", json=body, headers={"Idempotency-Key": "one"}) for _ in range(6)]
    (path,) = {answer.headers["location"] for answer in created}
    wait_until(lambda: fresh(pair, "GET", path).json()["step"] > 0)
    assert Counter(fresh(pair, "GET", path).status_code for _ in range(10)) == {200: 10}
    assert fresh(pair, "DELETE", path).json()["status"] == "cancelled"
    ends = [fresh(pair, "GET", f"{path}/events").text.split("\n")[1] for _ in range(6)]
    assert set(ends) == {"event: cancelled"}

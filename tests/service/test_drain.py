"""SIGTERM: what runs is finished, what comes is told to go elsewhere, and nobody gets half an answer."""

from __future__ import annotations

import signal
import time

from service.cli.serve import LINGER_SECONDS
from tests.benchmarks.drains import drain
from tests.helpers.servers import PATIENCE, wait_until

CLIENTS = 8


def test_under_load_no_answer_is_broken(start_server):
    with start_server(LDM_QUEUE_SIZE="100") as server:
        counts = drain(
            server.process,
            str(server.client.base_url),
            CLIENTS,
            lambda: wait_until(lambda: server.metric("ldm_images_total") >= 2 * CLIENTS),
        )
    assert set(counts) <= {"made", "refused", "closed"}, counts
    assert counts["made"] > 2 * CLIENTS  # those that were running too
    assert counts["refused"] + counts["closed"] == CLIENTS


def test_a_job_that_ends_in_the_drain_can_still_be_asked_for(start_server):
    with start_server() as server:
        job = {"task": "generate", "request": {"prompt": "p", "steps": 200}}
        path = server.client.post("/jobs", json=job).headers["location"]
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.health()["status"] == "draining")
        answer = server.client.get("/health")
        assert answer.headers["connection"] == "close"
        wait_until(lambda: server.health()["jobs"] == 0)
        time.sleep(2 * LINGER_SECONDS)
        assert server.client.get(path).json()["result"]["images"]
        assert server.process.wait(PATIENCE) == 0

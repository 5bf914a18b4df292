"""SIGTERM: running jobs finish, new requests get a 503, and every response is whole."""

from __future__ import annotations

import signal
import time

from service.cli.serve import LINGER_SECONDS
from tests.benchmarks.drains import drain
from tests.helpers.servers import MAX_WAIT_SECONDS, wait_until

CLIENTS = 8


def test_no_response_is_broken_under_load(start_server):
    with start_server(LDM_QUEUE_SIZE="100") as server:
        counts = drain(
            server.process,
            str(server.client.base_url),
            CLIENTS,
            lambda: wait_until(lambda: server.metric("ldm_images_total") >= 2 * CLIENTS),
        )
    assert set(counts) <= {"made", "refused", "closed"}, counts
    assert counts["made"] > 2 * CLIENTS  # those that were running when the signal came, too
    assert counts["refused"] + counts["closed"] == CLIENTS


def test_a_job_that_ends_during_the_drain_can_still_be_read(start_server):
    with start_server() as server:
        job = {"task": "generate", "request": {"prompt": "p", "steps": 100}}
        path = server.client.post("/jobs", json=job).headers["location"]
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.health()["status"] == "draining")
        answer = server.client.get("/health")
        assert answer.headers["connection"] == "close"
        wait_until(lambda: server.health()["jobs"] == 0)
        time.sleep(2 * LINGER_SECONDS)
        assert server.client.get(path).json()["result"]["images"]
        assert server.process.wait(MAX_WAIT_SECONDS) == 0

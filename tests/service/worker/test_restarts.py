"""Workers that are killed or stall are replaced, and their jobs give the same images; SIGTERM drains."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

from service.worker.replica import MAX_FAILURES
from tests.helpers.clients import LONG, alone, error_of, post, together, wait_for_running, worst_psnr
from tests.helpers.servers import MAX_WAIT_SECONDS, wait_until


def test_a_killed_worker_loses_no_job(server):
    bodies = [{"prompt": f"kept {i}", "steps": 150 + 25 * i, "seed": i} for i in range(3)]
    expected = alone(server, bodies)
    restarts = server.metric("ldm_worker_restarts_total")
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = together(server, pool, bodies)
        wait_for_running(server, len(bodies))
        server.kill_worker()
        assert not server.is_ready
        assert server.client.get("/health/live").status_code == 200
        assert worst_psnr(expected, answers) >= 40
    assert server.metric("ldm_worker_restarts_total") == restarts + 1


def test_a_worker_that_is_killed_repeatedly_before_it_is_ready_is_started_again(server):
    for _ in range(MAX_FAILURES + 1):
        server.kill_worker()
    assert post(server, {"prompt": "p"}).status_code == 200


def test_jobs_survive_many_workers_that_are_killed_from_outside(server):
    bodies = [LONG | {"steps": 60, "seed": i} for i in range(2)]
    expected = alone(server, bodies)
    with ThreadPoolExecutor(2) as pool:
        answers = together(server, pool, bodies)
        for calls in (3, 15, 8):  # each at another step
            wait_until(lambda: server.is_ready)
            wait_until(lambda: server.metric("ldm_jobs_running") >= 1)
            before = server.calls()
            wait_until(lambda before=before, calls=calls: server.calls() >= before + calls)
            server.kill_worker()
        assert worst_psnr(expected, answers) >= 40


def test_a_job_survives_workers_that_are_killed_as_soon_as_they_are_ready(server):
    body = {"prompt": "p", "steps": 20, "seed": 1}
    (expected,) = alone(server, [body])
    with ThreadPoolExecutor(1) as pool:
        server.kill_worker()
        answers = together(server, pool, [body])
        for _ in range(4):
            wait_until(lambda: server.is_ready)
            server.kill_worker()
        assert worst_psnr([expected], answers) >= 40


def test_a_worker_ignores_sigterm_and_sigint(server):
    for number in (signal.SIGTERM, signal.SIGINT):
        worker = server.signal_worker(number)
    assert post(server, {"prompt": "p", "steps": 50}).status_code == 200
    assert server.worker() == worker


def test_a_stalled_worker_is_replaced_and_sigterm_drains(start_server):
    body = {"prompt": "p", "steps": 80, "seed": 1}
    with start_server(LDM_STALL_SECONDS="5") as server, ThreadPoolExecutor(1) as pool:
        (expected,) = alone(server, [body])
        answers = together(server, pool, [body])
        wait_for_running(server, 1)
        stalled = server.signal_worker(signal.SIGSTOP)
        assert worst_psnr([expected], answers) >= 40
        assert server.worker() != stalled

        (last,) = together(server, pool, [body | {"steps": 250}])
        wait_for_running(server, 1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.health()["status"] == "draining")
        refused = post(server, body)
        assert error_of(refused, 503)["code"] == "draining"
        assert int(refused.headers["retry-after"]) > 0
        assert server.client.get("/health/ready").status_code == 503
        assert server.client.get("/health/live").status_code == 200
        assert not last.done()
        assert last.result().status_code == 200
        assert server.process.wait(MAX_WAIT_SECONDS) == 0

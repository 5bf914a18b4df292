"""GET /activity: which jobs shared the most recent UNet calls."""

from __future__ import annotations

import zlib

import pytest

from service.engine.events import JobSteps, Stepped
from service.worker.call_log import MAX_CALLS, CallLog
from tests.helpers.clients import post
from tests.helpers.servers import Server, wait_until


def call(number: int) -> Stepped:
    return Stepped(2, 2, 1, 0.1, 1, 0, (JobSteps(str(number), 1, 2),))


def test_the_log_keeps_the_newest_calls_and_gives_those_after_a_number():
    log = CallLog()
    for number in range(1, MAX_CALLS + 11):
        log.record(0, call(number))
    assert log.count == MAX_CALLS + 10
    assert len(log.after(0)) == MAX_CALLS
    assert [item.call.jobs[0].job for item in log.after(log.count - 2)] == [
        str(log.count - 1),
        str(log.count),
    ]
    assert log.after(log.count) == log.after(log.count + 5) == []


@pytest.mark.everywhere
def test_rows_are_listed_by_job_and_ids_are_not_disclosed(server: Server):
    before = server.client.get("/activity").json()["last"]
    made = post(server, {"prompt": "a", "steps": 3, "n": 2, "guidance_scale": 3}).json()
    tag = f"{zlib.crc32(made['id'].encode()):08x}"

    def rows() -> int:
        calls = server.client.get("/activity", params={"after": before}).json()["calls"]
        return sum(job["rows"] for one in calls for job in one["jobs"] if job["tag"] == tag)

    wait_until(lambda: rows() == 3 * 2 * 2)  # in a cluster, replicas report once a second
    last = server.client.get("/activity").json()["last"]
    assert made["id"] not in server.client.get("/activity").text
    assert server.client.get("/activity", params={"after": last}).json()["calls"] == []

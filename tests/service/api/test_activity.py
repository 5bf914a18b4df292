"""GET /activity: which jobs shared the most recent UNet calls."""

from __future__ import annotations

import zlib

from service.engine.events import JobSteps, Stepped
from service.worker.call_log import MAX_CALLS, CallLog
from tests.helpers.clients import post
from tests.helpers.servers import Server


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


def test_rows_are_listed_by_job_and_ids_are_not_disclosed(server: Server):
    before = server.client.get("/activity").json()["last"]
    made = post(server, {"prompt": "a", "steps": 3, "n": 2, "guidance_scale": 3}).json()
    activity = server.client.get("/activity", params={"after": before}).json()
    tag = f"{zlib.crc32(made['id'].encode()):08x}"
    mine = [job for one in activity["calls"] for job in one["jobs"] if job["tag"] == tag]
    assert sum(job["rows"] for job in mine) == 3 * 2 * 2
    assert made["id"] not in server.client.get("/activity").text
    assert server.client.get("/activity", params={"after": activity["last"]}).json()["calls"] == []

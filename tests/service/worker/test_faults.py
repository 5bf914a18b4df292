"""Faults on request, in the engine's loop and in a real worker."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models.checkpoint import load
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.engine import Engine
from service.engine.events import Done, Event, Incident
from service.engine.job import Job
from service.worker.faults import Fault, FaultyRunner, read_faults
from tests.helpers.clients import alone, error_of, together, worst_psnr
from tests.helpers.fake_runner import CountingRunner, make_job, outcomes


def test_faults_are_read_from_text_and_written_as_such():
    faults = read_faults("step:oom:poison, decode:nan:bad word:2")
    assert faults == (Fault("step", "oom", "poison"), Fault("decode", "nan", "bad word", 2))
    assert read_faults(",".join(map(str, faults))) == faults
    assert read_faults("") == ()


@pytest.mark.parametrize(
    "text", ["step", "step:oom", "step:oom:", "walk:oom:p", "step:flood:p", "step:oom:p:x"]
)
def test_what_is_no_fault_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        read_faults(text)


def run(runner, jobs: list[Job]) -> list[Event]:
    events: list[Event] = []
    engine = Engine(runner, events.append, runner.buckets[-1], 4)
    for job in jobs:
        engine.submit(job)
    while engine.busy:
        engine.tick()
    return events


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        ("load:error:poison", "job_failed"),
        ("load:oom:poison", "out_of_memory"),
        ("start:error:poison", "job_failed"),
        ("start:oom:poison", "out_of_memory"),
        ("step:error:poison", "job_failed"),
        ("step:oom:poison", "out_of_memory"),
        ("step:nan:poison", "non_finite"),
        ("step:nan:poison:1", "done"),
        ("step:oom:poison:1", "done"),
        ("decode:error:poison", "job_failed"),
        ("decode:oom:poison", "out_of_memory"),
        ("decode:nan:poison", "non_finite"),
        ("step:error:another", "done"),
    ],
)
def test_a_fault_is_its_jobs_alone(faults, code):
    jobs = [make_job(str(i), n=i) for i in range(1, 4)] + [make_job("bad", prompt="some poison", n=2)]
    events = run(FaultyRunner(CountingRunner((4, 8, 16)), read_faults(faults)), jobs)
    assert outcomes(events) == {"1": "done", "2": "done", "3": "done", "bad": code}
    stage, kind, _ = faults.split(":", 2)
    told = {(event.kind, event.stage) for event in events if isinstance(event, Incident)}
    expected = {"oom": "out_of_memory", "nan": "non_finite"}.get(kind)
    assert told == ({(expected, stage)} if expected else set())


@pytest.mark.parametrize("faults", ["step:nan:poison:1", "step:oom:poison", "step:error:poison"])
def test_neighbours_of_a_poison_job_come_back_as_they_would_alone(tiny: Path, faults):
    registry = Registry({"m": tiny}, load)
    fields = {"width": 64, "height": 64, "steps": 2, "guidance_scale": 1.0}
    jobs = [
        make_job("a", **fields, seed=1),
        make_job("b", **fields, prompt="poison"),
        make_job("c", **fields),
    ]

    def pictures(faults: str, jobs: list[Job]) -> dict[str, tuple[bytes, ...]]:
        # One bucket, so that even the last bits say something.
        runner = FaultyRunner(TorchRunner(registry, (4,), invariant=True), read_faults(faults))
        return {event.job: event.images for event in run(runner, jobs) if isinstance(event, Done)}

    expected = {job.id: pictures("", [job])[job.id] for job in jobs}
    survivors = "abc" if "nan" in faults else "ac"
    assert pictures(faults, jobs) == {name: expected[name] for name in survivors}


BODIES = [{"prompt": f"picture {i}", "steps": 4 + i, "seed": i} for i in range(4)]


@pytest.mark.parametrize("kind", ["kill", "stall", "device"])
def test_a_job_that_ends_its_worker_is_found_and_refused_and_its_neighbours_are_made(start_server, kind):
    settings = {"LDM_FAULTS": f"step:{kind}:poison", "LDM_STALL_SECONDS": "8"}
    with start_server(**settings) as server, ThreadPoolExecutor(8) as pool:
        before = alone(server, BODIES)
        answers = together(server, pool, [*BODIES, {"prompt": "poison", "steps": 4}])
        assert error_of(answers.pop().result(), 500)["code"] == "worker_lost"
        assert worst_psnr(before, answers) >= 40

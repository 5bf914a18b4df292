"""Faults on request: how they are written, and what becomes of their jobs in the engine's loop.

What a client sees of them is in test_faults_over_http.py.
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path

import pytest

from models.checkpoint import load
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.engine import Engine
from service.engine.events import Done, Event, Incident
from service.engine.job import Job
from service.worker.faults import STAGES, Fault, FaultyRunner, read_faults
from tests.helpers.fake_runner import CountingRunner, make_job, of, outcomes


def test_faults_are_read_from_text():
    faults = read_faults("step:oom:poison, decode:nan:bad word:2")
    assert faults == (Fault("step", "oom", "poison"), Fault("decode", "nan", "bad word", 2))
    assert read_faults("") == ()


@pytest.mark.parametrize(
    "text", ["step", "step:oom", "step:oom:", "walk:oom:p", "step:flood:p", "step:oom:p:x"]
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        read_faults(text)


def run(runner, jobs: list[Job]) -> list[Event]:
    events: list[Event] = []
    engine = Engine(runner, events.append, runner.buckets[-1], 4, time.monotonic)
    for job in jobs:
        engine.submit(job)
    while engine.busy:
        engine.tick()
    return events


ALWAYS = {"error": "job_failed", "oom": "out_of_memory", "nan": "non_finite"}
ONCE = {"error": "job_failed", "oom": "done", "nan": "done"}
INCIDENTS = {"oom": "out_of_memory", "nan": "non_finite"}


@pytest.mark.parametrize(("stage", "kind"), list(product(STAGES, ALWAYS)))
@pytest.mark.parametrize(("times", "codes"), [("", ALWAYS), (":1", ONCE)], ids=["always", "once"])
def test_a_fault_concerns_its_own_job_only(stage, kind, times, codes):
    jobs = [make_job(str(i), n=i) for i in range(1, 4)] + [
        make_job("bad", prompt="some poison", n=2, sampler="two_phases")
    ]
    faults = read_faults(f"{stage}:{kind}:poison{times}")
    events = run(FaultyRunner(CountingRunner((4, 8, 16)), faults), jobs)
    assert outcomes(events) == {"1": "done", "2": "done", "3": "done", "bad": codes[kind]}
    incidents = {(event.kind, event.stage) for event in of(events, Incident)}
    assert incidents == ({(INCIDENTS[kind], stage)} if kind in INCIDENTS else set())


def test_another_word_is_no_fault():
    events = run(FaultyRunner(CountingRunner((4,)), read_faults("step:error:another")), [make_job("a")])
    assert outcomes(events) == {"a": "done"}


@pytest.mark.parametrize("faults", ["step:nan:poison:1", "step:oom:poison", "step:error:poison"])
def test_the_neighbours_of_a_failing_job_have_the_bytes_that_they_have_alone(tiny: Path, faults):
    registry = Registry({"m": tiny}, load)
    fields = {"width": 64, "height": 64, "steps": 2, "guidance_scale": 1.0}
    jobs = [
        make_job("a", **fields, seed=1),
        make_job("b", **fields, prompt="poison"),
        make_job("c", **fields),
    ]

    def images_of(faults: str, jobs: list[Job]) -> dict[str, tuple[bytes, ...]]:
        # One bucket, so that even the last bits say something.
        runner = FaultyRunner(TorchRunner(registry, (4,), invariant=True), read_faults(faults))
        return {event.job: event.images for event in run(runner, jobs) if isinstance(event, Done)}

    expected = {job.id: images_of("", [job])[job.id] for job in jobs}
    survivors = "abc" if "nan" in faults else "ac"
    assert images_of(faults, jobs) == {name: expected[name] for name in survivors}

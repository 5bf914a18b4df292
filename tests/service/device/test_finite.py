"""NaN or Inf values are found with the next call, as on a CUDA device, and the job runs again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from models.checkpoint import load
from service.device.finite import FiniteChecker
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.engine import Engine
from service.engine.events import Done, Event, Incident
from service.engine.job import ImageKey, Job
from service.engine.runner import Call
from tests.helpers.fake_runner import make_job, outcomes

CPU = torch.device("cpu")


def turn(engine: Engine) -> None:
    while engine.busy:
        engine.tick()


def test_a_late_report_comes_with_the_next_call():
    checker: FiniteChecker[str] = FiniteChecker(CPU, late=True)
    flags = torch.tensor([True, False])
    assert checker.submit(["a", "b"], flags, checker.now()) == []
    assert checker.seconds is None
    assert checker.submit(["a", "c"], flags, checker.now()) == ["b"]
    assert checker.seconds > 0
    assert checker.flush() == ["c"]
    assert checker.flush() == []


class LateRunner(TorchRunner):
    """A runner with late reports; the latents of job b become NaN before step `at`, `times` times."""

    def __init__(self, tiny: Path, at: int = 0, times: int = 0) -> None:
        super().__init__(Registry({"m": tiny}, load), (4,), invariant=True)
        self.finite_checker.late = True
        self.at, self.times = at, times

    def step(self, keys: Sequence[ImageKey]) -> Call:
        for key in keys:
            image = self.jobs[key.job].images[key.image]
            if key.job == "b" and image.done + 1 == self.at and self.times:
                self.times -= 1
                image.state = image.state * torch.nan
        return super().step(keys)


def run(runner: TorchRunner, jobs: list[Job]) -> list[Event]:
    events: list[Event] = []
    engine = Engine(runner, events.append, 4, 4, time.monotonic)
    for job in jobs:
        engine.submit(job)
    turn(engine)
    assert engine.speed.seconds_per_work > 0
    return events


@pytest.fixture
def jobs() -> list[Job]:
    size = {"width": 64, "height": 64, "guidance_scale": 1.0}
    return [make_job("a", steps=3, **size), make_job("b", steps=4, seed=1, n=2, **size)]


def images_of(events: list[Event]) -> dict[str, tuple[bytes, ...]]:
    return {event.job: event.images for event in events if isinstance(event, Done)}


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_job_with_nan_values_runs_again_though_the_report_is_late(tiny: Path, jobs, at):
    expected = images_of(run(TorchRunner(Registry({"m": tiny}, load), (4,), invariant=True), jobs))
    assert images_of(run(LateRunner(tiny), jobs)) == expected
    events = run(LateRunner(tiny, at, times=1), jobs)
    assert images_of(events) == expected
    assert sum(event == Incident("non_finite", "step") for event in events) == 1


def test_a_job_with_nan_values_again_fails_alone(tiny: Path, jobs):
    events = run(LateRunner(tiny, at=4, times=9), jobs)
    assert outcomes(events) == {"a": "done", "b": "non_finite"}

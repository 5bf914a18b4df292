"""Images are decoded while later UNet calls run: the loop waits only for what has a call queued behind it.

A stand-in for a CUDA stream counts the points at which work was queued, and reports what is waited for.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from models.checkpoint import load
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.engine import Engine
from service.engine.events import Done
from service.engine.job import Job
from tests.helpers.fake_runner import make_job
from tests.helpers.images import psnr
from tests.helpers.torch_runner import run_jobs


class Stream:
    """A device that does nothing before it is waited for. idle_waits: for its very last work."""

    def __init__(self) -> None:
        self.queued = self.done = self.idle_waits = self.waits = 0


class Point:
    """A point in the stream."""

    def __init__(self, stream: Stream) -> None:
        stream.queued += 1
        self.stream, self.number = stream, stream.queued

    def wait(self) -> None:
        if not self.reached():
            self.stream.waits += 1
            self.stream.idle_waits += self.number == self.stream.queued
            self.stream.done = self.number

    def reached(self) -> bool:
        return self.number <= self.stream.done

    def seconds_since(self, begin: Point) -> float:
        return 0.01


def runner_with(tiny: Path, stream: Stream | None, batch: int = 1) -> TorchRunner:
    """A runner on a stream; None: on a CPU, which has finished each call when it returns."""
    runner = TorchRunner(Registry({"m": tiny}, load), (8,))
    runner._decoder.batch = batch
    if stream:
        runner.finite_checker.late = True
        runner.finite_checker.now = lambda: Point(stream)
    return runner


@pytest.fixture
def jobs() -> list[Job]:
    """Jobs that end one after the other while the last one runs."""
    return [
        make_job(name, width=64, height=64, steps=steps, n=n, guidance_scale=1.0)
        for name, steps, n in (("a", 2, 2), ("b", 3, 1), ("c", 5, 1), ("d", 12, 1))
    ]


def test_the_loop_never_waits_for_the_last_queued_work_while_images_have_steps_left(tiny: Path, jobs):
    stream, done = Stream(), []
    engine = Engine(runner_with(tiny, stream), done.append, 8, 4, time.monotonic)
    for job in jobs:
        engine.submit(job)
    while engine.scheduler.pick() or engine.pending:
        engine.tick()
        if engine.scheduler.pick():
            assert stream.idle_waits == 0
    early = [event.job for event in done if isinstance(event, Done)]
    assert early == ["a", "b", "c"], "they did not wait for the end of job d"
    assert stream.waits > 12
    while engine.busy:
        engine.tick()
    assert stream.idle_waits


def test_images_are_the_same_however_late_they_arrive(tiny: Path, jobs):
    expected = run_jobs(runner_with(tiny, None), *jobs)
    assert run_jobs(runner_with(tiny, Stream()), *jobs) == expected


def test_images_that_end_together_share_a_call_of_the_decoder(tiny: Path, jobs, monkeypatch):
    expected = run_jobs(runner_with(tiny, None), *jobs)
    runner, sizes = runner_with(tiny, Stream(), batch=4), []
    runner.registry.load("m")
    runner._decoder._limits[id(runner.registry["m"].autoencoder), 4, 8, 8] = 4
    decode = runner.registry["m"].decode
    monkeypatch.setattr(runner.registry["m"], "decode", lambda z: sizes.append(len(z)) or decode(z))
    images = run_jobs(runner, *jobs)
    assert sizes[0] == 2
    for name, own in expected.items():
        for one, other in zip(own, images[name], strict=True):
            assert psnr(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)) > 40


def test_a_cancelled_jobs_image_is_not_returned(tiny: Path, jobs):
    runner, events = runner_with(tiny, Stream()), []
    engine = Engine(runner, events.append, 8, 4, time.monotonic)
    for job in jobs:
        engine.submit(job)
    while not engine.decoding:
        engine.tick()
    engine.cancel("a")
    while engine.busy:
        engine.tick()
    assert sorted(event.job for event in events if isinstance(event, Done)) == ["b", "c", "d"]
    assert not engine.decoding

"""The service's real runner on a small model, without a server."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from models.checkpoint import load
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.engine import Engine
from service.engine.events import Done, Event, Stepped
from service.engine.job import ImageKey, Job
from tests.helpers.fake_runner import make_job, outcomes


def run_together(runner: TorchRunner, *jobs: Job) -> tuple[list[list[bytes]], list[Stepped]]:
    """Run jobs together; returns the images of each, and the events of all UNet calls."""
    events = events_of(runner, *jobs)
    assert set(outcomes(events).values()) == {"done"}
    done = {event.job: event.images for event in events if isinstance(event, Done)}
    return [done[job.id] for job in jobs], [event for event in events if isinstance(event, Stepped)]


def run_jobs(runner: TorchRunner, *jobs: Job) -> dict[str, tuple[bytes, ...]]:
    """Run jobs together; returns job id -> images."""
    return {event.job: event.images for event in events_of(runner, *jobs) if isinstance(event, Done)}


def events_of(runner: TorchRunner, *jobs: Job) -> list[Event]:
    """Run jobs together; returns all events."""
    events: list[Event] = []
    engine = Engine(runner, events.append, 8, 4, time.monotonic)
    for job in jobs:
        engine.submit(job)
    while engine.busy:
        engine.tick()
    return events


KEY = ImageKey("a", 0)


def runner_on(tiny: Path, dtype: torch.dtype = torch.float32) -> TorchRunner:
    return TorchRunner(Registry({"m": tiny}, lambda path: load(path, dtype=dtype)), buckets=(2, 4, 8))


def tiny_job(**changes) -> Job:
    return make_job("a", width=64, height=64, steps=3, **changes)


def begin(runner: TorchRunner, job: Job) -> None:
    runner.shape(job)
    runner.start(job)


def made(runner: TorchRunner, job: Job) -> bytes:
    """Run a job to its end and return its first image."""
    while left(runner, job):
        runner.step([KEY])
    return decoded(runner, KEY)


def decoded(runner: TorchRunner, key: ImageKey) -> bytes:
    """Decode an image and wait for it. Raises as the decoder does."""
    runner.settle()
    runner.decode([key])
    [image] = runner.decoded(wait=True)
    if isinstance(image.result, Exception):
        raise image.result
    return image.result


def left(runner: TorchRunner, job: Job) -> int:
    """Steps left of the first image, in its current phase."""
    state = runner.jobs[job.id]
    return len(state.phase(state.images[0])) - state.images[0].done

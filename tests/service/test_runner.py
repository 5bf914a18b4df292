"""Real tensors on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.checkpoint import load
from service import runner as module
from service.errors import OutOfMemory
from service.job import ImageKey, Job
from service.registry import Registry
from service.runner import TorchRunner
from tests.service.test_engine import make_job

KEY = ImageKey("a", 0)


@pytest.fixture
def runner(tiny: Path) -> TorchRunner:
    return TorchRunner(Registry({"m": tiny}, load), buckets=(2, 4))


def tiny_job(**changes) -> Job:
    return make_job("a", width=64, height=64, steps=3, **changes)


def begin(runner: TorchRunner, job: Job) -> None:
    runner.shape(job)
    runner.start(job)


def made(runner: TorchRunner, job: Job) -> bytes:
    """The first picture of a job that has begun, whatever steps it has behind it."""
    while runner.jobs[job.id].images[0].done < job.steps:
        runner.step([KEY])
    return runner.finish(KEY)


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("no memory")


def test_a_step_that_failed_draws_the_same_noise_again(runner, monkeypatch):
    job = tiny_job(eta=1.0)
    begin(runner, job)
    expected = made(runner, job)
    begin(runner, job)
    with monkeypatch.context() as failing:
        failing.setattr(module, "step", out_of_memory)
        with pytest.raises(OutOfMemory):
            runner.step([KEY])
    assert made(runner, job) == expected


def test_no_memory_for_the_text_or_the_picture_is_an_error_of_its_own(runner, monkeypatch):
    job = tiny_job()
    begin(runner, job)
    monkeypatch.setattr(runner.registry["m"], "decode", out_of_memory)
    with pytest.raises(OutOfMemory):
        runner.finish(KEY)
    monkeypatch.setattr(runner.registry["m"], "conditioner", out_of_memory)
    with pytest.raises(OutOfMemory):
        runner.start(job)

"""Keys and values of contexts: computed once for each condition of a job, with the same images as without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.networks.unet import UNet
from service.device import context_keys, starting
from service.device.runner import TorchRunner
from service.engine.job import Hires, Job
from tests.helpers.torch_runner import begin, made, run_jobs, runner_on, tiny_job

SCHEDULED = replace(tiny_job(), prompt="[cat:dog:1] AND [x|y]", prompt_syntax="a1111", guidance_scale=3.0)
JOBS = {
    "guided": tiny_job(prompt="cat", guidance_scale=3.0),
    "unguided": tiny_job(prompt="cat", guidance_scale=1.0),
    "scheduled": SCHEDULED,
    "second pass": tiny_job(prompt="cat", hires=Hires(128, 128, 4, 0.5, "lanczos", "dog", "")),
}


@pytest.fixture
def runner(tiny: Path) -> TorchRunner:
    return runner_on(tiny)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of conditions in each computation of keys and values."""
    calls: list[int] = []
    keys_values = UNet.keys_values

    def counted(self, context):
        calls.append(len(context))
        return keys_values(self, context)

    monkeypatch.setattr(UNet, "keys_values", counted)
    return calls


def pixels(runner: TorchRunner, job: Job) -> np.ndarray:
    ((image,),) = run_jobs(runner, job).values()
    return np.frombuffer(image, np.uint8).astype(int)


def test_a_job_computes_each_condition_once_and_alone(runner, computed):
    begin(runner, JOBS["guided"])
    made(runner, JOBS["guided"])
    assert computed == [1, 1]


def test_a_condition_without_rows_is_not_computed(runner, computed):
    begin(runner, JOBS["unguided"])
    made(runner, JOBS["unguided"])
    assert computed == [1]


@pytest.mark.parametrize("name", JOBS)
def test_images_are_those_of_unet_calls_with_the_context(runner, monkeypatch, name):
    ours = pixels(runner, JOBS[name])
    monkeypatch.setattr(starting, "attended", lambda bundle, context: None)
    assert abs(ours - pixels(runner, JOBS[name])).max() <= 1


def test_conditions_that_are_not_kept_are_computed_again(runner, monkeypatch, computed):
    expected = pixels(runner, SCHEDULED)
    once = len(computed)
    monkeypatch.setattr(context_keys, "MAX_CONDITIONS", 1)
    assert (pixels(runner, SCHEDULED) == expected).all()
    assert len(computed) - once > once


def test_jobs_of_one_call_use_their_own_contexts(runner):
    jobs = [replace(JOBS["guided"], id=id_, prompt=prompt) for id_, prompt in (("a", "cat"), ("b", "dog"))]
    together = run_jobs(runner, *jobs)
    for job in jobs:
        ours = np.frombuffer(together[job.id][0], np.uint8).astype(int)
        assert abs(ours - pixels(runner, job)).max() <= 1


def test_a_job_that_runs_again_in_float32_has_keys_in_float32(tiny):
    runner = runner_on(tiny, torch.bfloat16)
    for full_precision, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        runner.start(JOBS["guided"], full_precision)
        attended = runner.jobs["a"].phases[0].attended
        assert [row.dtype for row in attended.rows((0, 1))] == [dtype] * 2

"""Guidance that acts in a part of the run, and its rescaling, on the tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load
from models.conditioning.conditioner import ConditioningInput
from models.sampling.guidance import rescale
from models.sampling.samplers import plan
from models.sampling.step import step
from models.sampling.table import SIGMA
from service.device.registry import Registry
from service.device.runner import TorchRunner
from tests.checkpoints.tiny import write_tiny_model
from tests.helpers.fake_runner import make_job
from tests.helpers.images import IMAGE, psnr
from tests.helpers.torch_runner import begin, made, run_jobs, run_together, runner_on, tiny_job

INTERVAL = {"guidance_start": 0.25, "guidance_end": 0.75}


def test_an_image_outside_the_interval_costs_one_row(tiny: Path):
    runner = runner_on(tiny)
    job = tiny_job(**INTERVAL)
    segments = runner.shape(replace(job, steps=8)).segments
    assert [(segment.rows, segment.evaluations) for segment in segments] == [(1, 2), (2, 4), (1, 2)]
    _, calls = run_together(runner, replace(job, steps=4))
    assert [call.rows for call in calls] == [1, 2, 2, 1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_image_is_that_of_the_formula(tmp_path: Path, prediction):
    runner = runner_on(write_tiny_model(tmp_path, prediction=prediction))
    job = tiny_job(**INTERVAL, guidance_rescale=0.7, guidance_scale=6.0)
    job = replace(job, steps=4)
    bundle = runner.registry["m"]
    with torch.inference_mode():
        lines = torch.from_numpy(plan(bundle.schedule, "ddim", 4).coeffs)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(job.seed))[:, None]
        contexts = bundle.context_pair(ConditioningInput(job.prompt, job.negative_prompt)).tokens
        for number, line in enumerate(lines):
            alpha_sigma = line[None, 1:3].float()
            uncond, cond = (
                bundle.denoiser(x[:, 0], line[:1], context[None], alpha_sigma=alpha_sigma)
                for context in contexts
            )
            eps = cond
            if number in (1, 2):
                offset = bundle.denoiser.eps_offset(x[0, 0], line[SIGMA].float())
                eps = rescale((uncond + 6 * (cond - uncond))[0], cond[0], 0.7, offset)[None]
            x = step(x, eps, line[None])
        expected = ((bundle.decode(x[:, 0])[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    begin(runner, job)
    image = np.frombuffer(made(runner, job), np.uint8).reshape(64, 64, 3)
    assert np.abs(image - expected).max() < 1
    assert psnr(image, np.frombuffer(made_plain(runner), np.uint8).reshape(64, 64, 3)) < 45


def made_plain(runner: TorchRunner) -> bytes:
    job = replace(tiny_job(guidance_scale=6.0), steps=4)
    begin(runner, job)
    return made(runner, job)


def test_neighbours_change_no_bit_in_invariant_mode(tiny: Path):
    runner = TorchRunner(Registry({"m": tiny}, load), (8,), invariant=True)
    fields = {"width": 64, "height": 64, "steps": 5, "guidance_scale": 4.0}
    jobs = [
        make_job("plain", **fields),
        make_job("single", **fields | {"guidance_scale": 1.0}),
        make_job("interval", **fields, **INTERVAL, n=2),
        make_job("rescaled", **fields, guidance_rescale=0.7, sampler="dpmpp_2m"),
        make_job("both", **fields, **INTERVAL, guidance_rescale=1.0, image=IMAGE.tobytes(), strength=0.8),
    ]
    together = run_jobs(runner, *jobs)
    assert together == {job.id: run_jobs(runner, job)[job.id] for job in jobs}

"""Prompts in A1111's syntax on the runner: the rows of each call, their contexts, and the prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load, save
from models.conditioning.conditioner import ConditioningInput
from service.device.batch import unet_inputs
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.job import Job
from tests.checkpoints.tiny import random_model, scene_spec
from tests.helpers.torch_runner import KEY, begin, made, run_jobs, runner_on, tiny_job


@pytest.fixture
def runner(tiny: Path) -> TorchRunner:
    return runner_on(tiny)


def composed(prompt: str, **changes) -> Job:
    return replace(tiny_job(), prompt=prompt, prompt_syntax="a1111", **changes)


def rows_of(runner: TorchRunner, job: Job) -> list:
    """The rows of each call of a job."""
    begin(runner, job)
    return list(runner.jobs[job.id].phases[0].outline.rows)


def test_a_prompt_without_syntax_gives_the_bits_of_a_plain_one(runner):
    plain, own = tiny_job(prompt="a red apple"), composed("a red apple")
    begin(runner, plain)
    expected = made(runner, plain)
    begin(runner, own)
    assert made(runner, own) == expected


def test_and_costs_one_row_for_each_part(runner):
    guided = rows_of(runner, composed("cat :0.5 AND dog", guidance_scale=4.0))
    assert [(each.rows, each.weights) for each in guided] == [((0, 1, 2), (2.0, 4.0))] * 3
    assert [each.rows for each in rows_of(runner, composed("cat", guidance_scale=1.0))] == [(1,)] * 3
    weighted = rows_of(runner, composed("cat :0.5", guidance_scale=1.0))[0]
    assert (weighted.rows, weighted.weights) == ((0, 1), (0.5,))
    assert [each.rows for each in rows_of(runner, composed("cat AND dog", guidance_scale=0.0))] == [(0,)] * 3
    (segment,) = runner.shape(composed("cat AND dog")).segments
    assert (segment.rows, segment.evaluations) == (3, 3)


def test_an_edited_prompt_takes_another_context_at_its_step(runner):
    job = composed("[cat:dog:1]", steps=4, negative_prompt="[x|y]")
    assert [each.rows for each in rows_of(runner, job)] == [(0, 1), (0, 1), (2, 3), (0, 3)]
    context = runner.jobs["a"].phases[0].context.tokens
    for row, text in enumerate(("x", "cat", "y", "dog")):
        expected = runner.registry["m"].context_pair(ConditioningInput(text, text)).tokens[1]
        assert torch.allclose(context[row], expected, atol=1e-5)


@torch.inference_mode()
def test_the_parts_are_added_to_the_negative_prompt_by_weight(runner):
    """One step, against the formula on the UNet's own predictions."""
    job = composed("cat :0.5 AND dog :-1", guidance_scale=3.0, negative_prompt="blue", preview_every=1)
    begin(runner, job)
    state = runner.jobs["a"]
    (image,), bundle = state.images, state.bundle
    x, (t, alpha, sigma) = image.x.clone(), state.line(image)[:3].tolist()

    def eps(text: str) -> torch.Tensor:
        tokens = bundle.context_pair(ConditioningInput(text)).tokens[1:]
        return bundle.denoiser(
            x[None], torch.tensor([t]), tokens, alpha_sigma=torch.tensor([[alpha, sigma]])
        )[0]

    base = eps("blue")
    expected = base + 1.5 * (eps("cat") - base) - 3 * (eps("dog") - base)
    runner.step([KEY])
    assert torch.allclose((x - alpha * image.x_0) / sigma, expected, atol=1e-3)


def test_all_kinds_of_prompts_share_calls_and_change_no_image(runner):
    jobs = [
        replace(composed(prompt, seed=seed, guidance_scale=scale, steps=4), id=prompt)
        for seed, (prompt, scale) in enumerate(
            [("a AND b", 3.0), ("[a|b|c]", 3.0), ("a BREAK b", 2.0), ("[a:b:1] AND c:-0.5", 1.0), ("a", 5.0)]
        )
    ]
    jobs.append(replace(tiny_job(seed=9), id="plain", steps=4))
    together = run_jobs(TorchRunner(runner.registry, (16,), invariant=True), *jobs)
    for job in jobs:
        alone = run_jobs(TorchRunner(runner.registry, (16,), invariant=True), job)
        assert alone[job.id] == together[job.id]
    assert len(set(together.values())) == len(jobs)


def test_a_layout_is_seen_by_every_part_but_not_by_the_negative_prompt(tmp_path):
    save(random_model(scene_spec()), tmp_path / "scene", torch.float32)
    runner = TorchRunner(Registry({"m": tmp_path / "scene"}, load), buckets=(4,))
    regions = np.full((8, 8), 2, np.uint16).tobytes()
    begin(runner, composed("cat AND dog", regions=regions))
    state = runner.jobs["a"]
    inputs = unet_inputs([state], state.images, [state.rows(state.images[0])], torch.device("cpu"))
    concat = state.images[0].concat
    assert torch.equal(inputs.concat, concat[[0, 1, 1]])

"""Variations and clip_skip on the runner: the noise and the context that a job starts with."""

from __future__ import annotations

from pathlib import Path

import torch

from models.sampling.noise import slerp
from service.engine.job import Variation
from tests.helpers.torch_runner import begin, made, runner_on, tiny_job


def draw(seed: int) -> torch.Tensor:
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_image_i_mixes_the_seed_with_the_variation_seed_plus_i(tiny: Path):
    runner = runner_on(tiny)
    begin(runner, tiny_job(seed=5, n=2, variation=Variation(9, 0.25)))
    images = runner.jobs["a"].images
    assert torch.equal(images[0].x, slerp(0.25, draw(5), draw(9)))
    assert torch.equal(images[1].x, slerp(0.25, draw(5), draw(10)))


def test_noise_of_later_steps_is_that_of_the_seed(tiny: Path):
    runner, job = runner_on(tiny), tiny_job(seed=5, eta=1.0)
    begin(runner, job)
    plain = made(runner, job)
    begin(runner, tiny_job(seed=5, eta=1.0, variation=Variation(9, 1.0)))
    assert made(runner, job) != plain
    generator = torch.Generator().manual_seed(5)
    torch.randn(4, 8, 8, generator=generator)
    begin(runner, tiny_job(seed=5, eta=1.0, variation=Variation(9, 1.0)))
    state = runner.jobs["a"].images[0].generator
    assert torch.equal(state.get_state(), generator.get_state())


def test_clip_skip_changes_the_context_and_one_is_none(tiny: Path):
    runner = runner_on(tiny)
    contexts = []
    for changes in ({}, {"clip_skip": 1}, {"clip_skip": 2}):
        begin(runner, tiny_job(**changes))
        contexts.append(runner.jobs["a"].phases[0].context.tokens)
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.allclose(contexts[0], contexts[2], atol=1e-3)

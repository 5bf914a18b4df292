"""A refiner, which makes the last steps of a run, on the tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load
from models.conditioning.conditioner import ConditioningInput
from models.sampling.guidance import guide
from models.sampling.samplers import first_call, plan
from models.sampling.step import step
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.job import ModelKey, Refiner
from service.errors import OutOfMemory
from tests.checkpoints.tiny import write_tiny_model
from tests.helpers.fake_runner import make_job
from tests.helpers.images import IMAGE, MASK
from tests.helpers.torch_runner import run_jobs

FIELDS = {"width": 64, "height": 64, "steps": 5, "guidance_scale": 4.0}
REFINER = Refiner("k", 0.6)


@pytest.fixture(scope="module")
def paths(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"m": tiny, "k": write_tiny_model(tmp_path_factory.mktemp("refiner"), seed=1)}


@pytest.fixture
def runner(paths: dict[str, Path]) -> TorchRunner:
    return TorchRunner(Registry(paths, load), (8,), invariant=True)


@pytest.mark.parametrize(
    ("sampler", "calls", "part", "first"),
    [
        ("ddim", 10, 0.8, 8),
        ("ddim", 25, 0.28, 7),
        ("ddim", 3, 0.5, 2),
        ("ddim", 3, 0.9, 3),
        ("heun", 19, 0.5, 10),
        ("heun", 19, 0.6, 12),
    ],
)
def test_the_refiner_takes_over_at_the_next_step(sampler, calls, part, first):
    assert first_call(sampler, calls, part) == first


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_the_refiner_goes_on_from_the_latent_of_the_base_with_its_own_context(runner, sampler):
    base, refiner = runner.registry["m"], runner.registry["k"]
    run = plan(base.schedule, sampler, 5)
    with torch.inference_mode():
        noise = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        state = torch.cat([noise, torch.zeros(1, run.history, 4, 8, 8)], dim=1)
        for number, line in enumerate(torch.from_numpy(run.coeffs)):
            model = base if number < 3 else refiner
            tokens = model.context_pair(ConditioningInput("p", "")).tokens
            uncond, cond = (model.denoiser(state[:, 0], line[:1], row[None]) for row in tokens)
            state = step(state, guide(uncond, [(cond, 4.0)]), line[None])
        expected = ((base.decode(state[:, 0])[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    (image,) = run_jobs(runner, make_job("a", **FIELDS, sampler=sampler, refiner=REFINER))["a"]
    assert np.abs(np.frombuffer(image, np.uint8).reshape(64, 64, 3) - expected).max() < 1


def test_neighbours_change_no_bit(runner):
    jobs = [
        make_job("base", **FIELDS),
        make_job("refiner", **FIELDS | {"model": "k"}),
        make_job("refined", **FIELDS, refiner=REFINER, n=2),
        make_job("later", **FIELDS | {"steps": 7}, refiner=Refiner("k", 0.3), guidance_start=0.5),
        make_job("single", **FIELDS | {"guidance_scale": 1.0}, refiner=REFINER, sampler="heun"),
        make_job("image", **FIELDS, refiner=REFINER, image=IMAGE.tobytes(), strength=0.8, eta=1.0),
        make_job("masked", **FIELDS, refiner=REFINER, image=IMAGE.tobytes(), mask=MASK.tobytes()),
    ]
    together = run_jobs(runner, *jobs)
    assert together == {job.id: run_jobs(runner, job)[job.id] for job in jobs}
    assert len(set(together.values())) == len(jobs)


def test_both_models_are_loaded_before_the_job_starts(paths):
    registry = Registry(paths, load, lambda spec: 1, memory=2)
    runner = TorchRunner(registry, (2,))
    job = make_job("a", **FIELDS, refiner=REFINER)
    assert job.model_keys == (ModelKey("m"), ModelKey("k"))
    assert runner.load(job, ())
    assert registry.is_loaded("m")
    assert registry.is_loaded("k")


def test_models_that_do_not_fit_together_are_refused_unless_others_are_in_the_way(paths, tmp_path):
    registry = Registry(paths | {"other": write_tiny_model(tmp_path)}, load, lambda spec: 1, memory=1)
    runner = TorchRunner(registry, (2,))
    job = make_job("a", **FIELDS, refiner=REFINER)
    registry.load("other")
    assert not runner.load(job, {ModelKey("other")})
    with pytest.raises(OutOfMemory):
        runner.load(job, ())

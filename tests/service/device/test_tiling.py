"""Seamless images on the runner: a group of their own, and no effect on other jobs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.device.runner import TorchRunner
from tests.helpers.images import IMAGE
from tests.helpers.torch_runner import run_jobs, runner_on, tiny_job


@pytest.fixture
def runner(tiny: Path) -> TorchRunner:
    return TorchRunner(runner_on(tiny).registry, (8,), invariant=True)


def test_tiled_and_other_jobs_change_no_bit_of_each_other(runner):
    jobs = [replace(tiny_job(seed=1), id=axes, tiling=axes) for axes in ("none", "x", "y", "both")]
    jobs.append(replace(tiny_job(image=IMAGE.tobytes(), strength=0.7), id="image", tiling="both"))
    assert len({runner.shape(job).segments[0].group for job in jobs}) == 4
    together = run_jobs(runner, *jobs)
    for job in jobs:
        alone = run_jobs(TorchRunner(runner.registry, (8,), invariant=True), job)
        assert alone[job.id] == together[job.id]
    assert len(set(together.values())) == len(jobs)


def seam(pixels: np.ndarray, axis: int) -> float:
    """The mean difference of pixels across the opposite edges, relative to that of neighbours inside."""
    steps = np.abs(np.diff(pixels.astype(float), axis=axis)).mean()
    return float(np.abs(pixels.take(0, axis).astype(float) - pixels.take(-1, axis)).mean() / steps)


def test_opposite_edges_match_along_the_chosen_axes_only(runner):
    jobs = [
        replace(tiny_job(seed=seed), id=f"{axes}{seed}", tiling=axes)
        for seed in range(6)
        for axes in ("x", "y")
    ]
    made = {
        job: np.frombuffer(files[0], np.uint8).reshape(64, 64, 3)
        for job, files in run_jobs(runner, *jobs).items()
    }
    for axes, match, other in (("x", 1, 0), ("y", 0, 1)):
        images = [pixels for job, pixels in made.items() if job.startswith(axes)]
        assert np.mean([seam(each, match) for each in images]) < 1.3
        assert np.mean([seam(each, other) for each in images]) > 1.3

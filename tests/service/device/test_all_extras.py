"""Jobs with every optional field run together, and each gives the same bits as alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from service.device.runner import TorchRunner
from service.engine.job import FeatureCache, Job, Variation
from tests.helpers.images import IMAGE, MASK
from tests.helpers.torch_runner import run_jobs, runner_on, tiny_job

MASKED = {"image": IMAGE.tobytes(), "mask": MASK.tobytes(), "keeps_pixels": False}
EXTRAS = {
    "plain": {},
    "variation": {"variation": Variation(7, 0.4)},
    "composition": {"prompt": "[cat|dog] AND [sun:moon:1] :0.5", "prompt_syntax": "a1111"},
    "chunks": {"prompt": "cat BREAK dog", "prompt_syntax": "a1111"},
    "tiling": {"tiling": "both"},
    "feature cache": {"feature_cache": FeatureCache(2, 0)},
    "cached composition": {
        "prompt": "cat AND dog",
        "prompt_syntax": "a1111",
        "tiling": "y",
        "feature_cache": FeatureCache(3, 1),
    },
    "interval": {"guidance_start": 0.3, "guidance_end": 0.8, "guidance_rescale": 0.7},
    "noise": MASKED | {"latent_fill": "noise", "strength": 0.8},
    "empty": MASKED | {"latent_fill": "zeros", "eta": 1.0},
    "tiled variation": {
        "tiling": "x",
        "variation": Variation(7, 1.0),
        "prompt": "a AND b",
        "prompt_syntax": "a1111",
    },
}


@pytest.fixture
def jobs() -> list[Job]:
    return [replace(tiny_job(), id=name, seed=3, steps=5, **changes) for name, changes in EXTRAS.items()]


def test_jobs_with_every_extra_change_no_bit_of_each_other(tiny: Path, jobs: list[Job]):
    registry = runner_on(tiny).registry
    together = run_jobs(TorchRunner(registry, (16,), invariant=True), *jobs)
    for job in jobs:
        assert run_jobs(TorchRunner(registry, (16,), invariant=True), job) == {job.id: together[job.id]}
    assert len(set(together.values())) == len(jobs)

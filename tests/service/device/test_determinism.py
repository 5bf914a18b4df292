"""An image does not depend on other jobs: with `invariant` to the last bit, without it to 40 dB."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from models.checkpoint import load
from models.sampling.samplers import SAMPLERS, spacings_of
from service.device.determinism import floor_power_of_two
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.engine import Engine
from service.engine.events import Done
from service.engine.job import Job
from tests.helpers.clients import EIGHT, post, together
from tests.helpers.environment import ROOT
from tests.helpers.fake_runner import make_job
from tests.helpers.images import psnr
from tests.helpers.servers import wait_until

pytestmark = pytest.mark.slow

SIZES = ((64, 64), (96, 64))  # two groups


def random_job(name: str, draw: random.Random) -> Job:
    width, height = draw.choice(SIZES)
    blobs = np.random.default_rng(draw.randrange(10**6))
    fields = {
        "prompt": draw.choice(["red apple", "", "a cat " * 40]),
        "steps": draw.randint(1, 4),
        "guidance_scale": draw.choice([0.0, 1.0, 3.0, 7.5]),
        "eta": draw.choice([0.0, 0.0, 0.5, 1.0]),
        "seed": draw.randrange(1000),
        "n": draw.choice([1, 1, 2]),
    }
    if draw.randrange(2):
        fields |= {"sampler": draw.choice(SAMPLERS), "eta": 0.0}
    fields["spacing"] = draw.choice([None, *spacings_of(fields.get("sampler", "ddim"))])
    if (task := draw.randrange(3)) > 0:
        fields["image"] = blobs.integers(0, 256, (height, width, 3), np.uint8).tobytes()
        fields["strength"] = draw.choice([0.5, 1.0])
    if task == 2:
        fields["mask"] = (255 * (blobs.random((height, width)) < 0.001).astype(np.uint8)).tobytes()
    return make_job(name, width=width, height=height, **fields)


def images(runner: TorchRunner, jobs: Sequence[Job], draw: random.Random) -> dict[str, tuple[bytes, ...]]:
    """All of them, arriving one after the other at any time."""
    done: dict[str, tuple[bytes, ...]] = {}
    engine = Engine(
        runner, lambda e: isinstance(e, Done) and done.update({e.job: e.images}), 8, 4, time.monotonic
    )
    for job in jobs:
        engine.submit(job)
        for _ in range(draw.randrange(3)):
            engine.tick()
    while engine.busy:
        engine.tick()
    return done


@pytest.fixture
def even_threads():
    """As configure_determinism() has it, and as it was again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(floor_power_of_two(threads))
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("even_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("invariant", [True, False])
def test_random_traffic_gives_the_images_of_solo_runs(tiny: Path, dtype, invariant):
    draw = random.Random(0)
    registry = Registry({"m": tiny}, lambda path: load(path, dtype=dtype))
    jobs = [random_job(str(i), draw) for i in range(7)]
    buckets = (8,) if invariant else (2, 4, 8)

    def runner() -> TorchRunner:  # a new one is what a restarted worker has
        return TorchRunner(registry, buckets, invariant)

    alone = {job.id: images(runner(), [job], draw)[job.id] for job in jobs}
    together = images(runner(), jobs, draw)
    shuffled = images(runner(), draw.sample(jobs, len(jobs)), draw)
    for company in (together, shuffled):
        if invariant:
            assert company == alone
        else:
            pairs = [pair for job in jobs for pair in zip(alone[job.id], company[job.id], strict=True)]
            assert min(psnr(a, b) for a, b in pairs) >= 40


def test_the_same_bytes_from_every_worker_that_is_killed_and_started_again(start_server):
    bodies = [
        {"prompt": f"image {i}", "steps": 10 + 3 * i, "seed": i, "n": 1 + i % 2, "sampler": sampler}
        for i, sampler in enumerate(EIGHT)
    ]
    with start_server(LDM_INVARIANT="1") as server, ThreadPoolExecutor(len(bodies)) as pool:
        expected = [files(post(server, body)) for body in bodies]
        server.kill_worker()
        wait_until(lambda: server.is_ready)
        before = server.calls()
        answers = together(server, pool, bodies[::-1])
        wait_until(lambda: server.calls() > before + 20)
        server.kill_worker()
        assert [files(answer.result()) for answer in reversed(answers)] == expected


def files(answer: httpx.Response) -> list[str]:
    """The files in an answer, in base64."""
    assert answer.status_code == 200, answer.text
    return [image["data"] for image in answer.json()["images"]]


def test_with_two_threads_a_rows_place_changes_nothing():
    """In its own process: MKL reads its settings before the first matrix product only."""
    code = (
        "import torch\n"
        "from service.device.determinism import configure_determinism\n"
        "configure_determinism(2, invariant=True)\n"
        "from tests.benchmarks.cuda_checks import random_model\n"
        "from tests.benchmarks.shapes import TINY, Setting, unet_inputs\n"
        "setting, spec = Setting(torch.device('cpu'), torch.float32), TINY['ldm-text'].spec\n"
        "model, given = random_model(spec, setting), unet_inputs(spec, 8, setting)\n"
        "turned = [None if rows is None else rows.roll(1, 0) for rows in given]\n"
        "with torch.inference_mode():\n"
        "    print(torch.equal(model.denoiser(*given).roll(1, 0), model.denoiser(*turned)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout == "True\n"

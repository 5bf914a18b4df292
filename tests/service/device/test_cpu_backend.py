"""The choice between torch and OpenVINO, and jobs on compiled models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.checkpoint import load
from models.latent_diffusion import LatentDiffusion
from service.device import cpu_backend
from service.device.cpu_backend import CpuBackend, choose_backend
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.job import FeatureCache
from service.settings import SettingError
from tests.helpers.images import psnr
from tests.helpers.torch_runner import run_jobs, tiny_job

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "device", "dtype", "invariant", "chosen"),
    [
        ("auto", CPU, BF16, False, "auto"),
        ("auto", CPU, BF16, True, "torch"),
        ("auto", CPU, torch.float16, False, "torch"),
        ("auto", CUDA, torch.float16, False, "torch"),
        ("torch", CPU, BF16, False, "torch"),
        ("openvino", CPU, BF16, True, "openvino"),
        ("openvino", CPU, F32, False, "openvino"),
    ],
)
def test_the_setting_and_what_it_chooses(with_openvino, name, device, dtype, invariant, chosen):
    assert choose_backend(name, device, dtype, invariant) == chosen


@pytest.mark.parametrize(
    ("device", "dtype", "invariant", "message"),
    [
        (CUDA, torch.float16, False, "runs on a CPU, but the device is cuda"),
        (CPU, torch.float16, False, "does not support float16"),
        (CPU, F32, True, "does not support float32 with invariant"),
    ],
)
def test_openvino_is_refused_where_it_cannot_run(with_openvino, device, dtype, invariant, message):
    with pytest.raises(SettingError, match=message):
        choose_backend("openvino", device, dtype, invariant)


def test_without_the_package_auto_is_torch_and_openvino_is_refused():
    assert choose_backend("auto", CPU, BF16, False) == "torch"
    with pytest.raises(SettingError, match=r"pip install '.\[openvino\]'"):
        choose_backend("openvino", CPU, BF16, False)


@pytest.fixture
def model(tiny: Path) -> LatentDiffusion:
    return load(tiny, dtype=BF16)


def measuring(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[float]:
    """Replace measurements, in the order torch, OpenVINO; returns those that are left."""
    left = list(seconds)
    monkeypatch.setattr(cpu_backend, "least_seconds", lambda call: left.pop(0))
    return left


@pytest.mark.parametrize(("seconds", "is_compiled"), [((1.2, 1.0), True), ((1.05, 1.0), False)])
def test_auto_chooses_openvino_if_it_is_faster_by_a_tenth(
    with_openvino, model, monkeypatch, tmp_path, seconds, is_compiled
):
    measuring(monkeypatch, *seconds)
    CpuBackend("auto", tmp_path).apply(model)
    assert model.is_compiled == is_compiled


def test_a_measurement_is_made_once(with_openvino, tiny, monkeypatch, tmp_path):
    left = measuring(monkeypatch, 1.2, 1.0, 1.0, 9.0)
    for _ in range(2):
        again = load(tiny, dtype=BF16)
        CpuBackend("auto", tmp_path).apply(again)
        assert again.is_compiled
    assert len(left) == 2
    other = load(tiny, dtype=F32)
    CpuBackend("auto", tmp_path).apply(other)
    assert not other.is_compiled


def test_a_damaged_file_of_measurements_is_ignored(with_openvino, model, monkeypatch, tmp_path):
    (tmp_path / cpu_backend.FILE).write_text("[1]")
    measuring(monkeypatch, 1.2, 1.0)
    CpuBackend("auto", tmp_path).apply(model)
    assert model.is_compiled


def test_a_compiled_unet_that_is_wrong_is_not_used(with_openvino, model, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_backend, "difference", lambda out, exact: float("nan"))
    CpuBackend("openvino", tmp_path).apply(model)
    assert not model.is_compiled


def runner_of(model: LatentDiffusion, path: Path, compiles: bool, invariant: bool = False) -> TorchRunner:
    if compiles:
        CpuBackend("openvino", path).apply(model)
    registry = Registry({"m": path}, lambda source: model)
    return TorchRunner(registry, (2, 8), invariant, compiles=compiles)


def test_images_agree_with_those_of_torch_in_float32(with_openvino, tiny):
    jobs = [replace(tiny_job(seed=seed), id=str(seed)) for seed in range(3)]
    exact = run_jobs(runner_of(load(tiny), tiny, compiles=False), *jobs)
    for dtype, least in ((F32, 60), (BF16, 35)):
        made = run_jobs(runner_of(load(tiny, dtype=dtype), tiny, compiles=True), *jobs)
        assert all(psnr(made[job.id][0], exact[job.id][0]) > least for job in jobs)


def test_with_invariant_other_jobs_change_no_bit(with_openvino, tiny):
    runner = runner_of(load(tiny, dtype=BF16), tiny, compiles=True, invariant=True)
    jobs = [replace(tiny_job(seed=seed), id=str(seed), guidance_scale=1.0 + seed) for seed in range(3)]
    together = run_jobs(runner, *jobs)
    for job in jobs:
        assert run_jobs(runner, job)[job.id] == together[job.id]


def test_jobs_that_need_torch_share_no_call_with_others(with_openvino, tiny):
    """Their images are those of torch, also when other jobs run."""
    cached = replace(tiny_job(seed=7), id="cached", feature_cache=FeatureCache(2, 0))
    plain = replace(tiny_job(seed=8), id="plain")
    runner = runner_of(load(tiny, dtype=BF16), tiny, compiles=True)
    groups = [runner.shape(job).segments[0].group for job in (cached, plain)]
    assert groups[0] != groups[1]
    assert run_jobs(runner, cached, plain)["plain"] == run_jobs(runner, plain)["plain"]


def test_non_finite_jobs_run_again_in_float32_by_torch(with_openvino, tiny, monkeypatch):
    model = load(tiny, dtype=BF16)
    runner = runner_of(model, tiny, compiles=True)
    assert model.denoiser is not None
    monkeypatch.setattr(model.denoiser.unet, "compiled", lambda x, *others: torch.full_like(x, torch.nan))
    job = replace(tiny_job(), id="a")
    exact = run_jobs(runner_of(load(tiny), tiny, compiles=False), job)
    assert psnr(run_jobs(runner, job)["a"][0], exact["a"][0]) > 35

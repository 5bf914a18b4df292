"""What a CUDA device asks for, as far as a CPU can show it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from models.checkpoint import load
from service.device import select
from service.device.finite import FiniteChecker
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.device.select import prepare_for_device
from service.device.torch_errors import translate_device_lost, translate_oom
from service.engine.engine import Engine
from service.engine.events import Done, Event, Incident
from service.engine.job import ImageKey, Job
from service.engine.runner import Call
from service.errors import DeviceLost, OutOfMemory
from service.worker.faults import FaultyRunner, read_faults
from tests.checkpoints.tiny import tiny_model
from tests.helpers.fake_runner import CountingRunner, make_job, outcomes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512", "vendor", "dtype"),
    [
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, True, "GenuineIntel", torch.float32),
        (False, True, "AuthenticAMD", torch.bfloat16),
        (False, False, "AuthenticAMD", torch.float32),
    ],
)
def test_a_cpu_runs_in_the_type_that_it_is_faster_in(monkeypatch, amx, avx512, vendor, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(select, "cpu_vendor", lambda: f"vendor_id : {vendor}\n")
    assert select.choose_dtype("auto", CPU) == dtype
    assert select.choose_dtype("float32", CPU) == torch.float32


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: unspecified launch failure",
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_a_device_that_fails_for_good_is_lost(message, kind):
    with pytest.raises(DeviceLost, match="CUDA error"), translate_device_lost(), translate_oom():
        raise kind(message)


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"])
def test_a_device_without_memory_is_not_lost(message):
    with pytest.raises(OutOfMemory), translate_device_lost(), translate_oom():
        raise RuntimeError(message)


def test_another_error_is_its_jobs_own():
    with pytest.raises(RuntimeError, match="shapes"), translate_device_lost():
        raise RuntimeError("shapes do not fit")


def turn(engine: Engine) -> None:
    while engine.busy:
        engine.tick()


@pytest.mark.parametrize("stage", ["start", "step", "decode"])
def test_a_lost_device_ends_the_loop_and_no_job(stage):
    events: list[Event] = []
    runner = FaultyRunner(CountingRunner((4,)), read_faults(f"{stage}:device:poison"))
    engine = Engine(runner, events.append, 4, 4, time.monotonic)
    engine.submit(make_job("a", prompt="poison"))
    with pytest.raises(DeviceLost):
        turn(engine)
    assert not outcomes(events)


def test_verdicts_that_are_late_come_with_the_next_call():
    checker: FiniteChecker[str] = FiniteChecker(CPU, late=True)
    flags = torch.tensor([True, False])
    assert checker.submit(["a", "b"], flags, checker.now()) == []
    assert checker.seconds is None
    assert checker.submit(["a", "c"], flags, checker.now()) == ["b"]
    assert checker.seconds > 0
    assert checker.flush() == ["c"]
    assert checker.flush() == []


class LateRunner(TorchRunner):
    """A runner whose device is behind; breaks the numbers of job b after its step `at`, so many times."""

    def __init__(self, tiny: Path, at: int = 0, times: int = 0) -> None:
        super().__init__(Registry({"m": tiny}, load), (4,), invariant=True)
        self.finite_checker = FiniteChecker(CPU, late=True)
        self.at, self.times = at, times

    def step(self, keys: Sequence[ImageKey]) -> Call:
        for key in keys:
            image = self.jobs[key.job].images[key.image]
            if key.job == "b" and image.done + 1 == self.at and self.times:
                self.times -= 1
                image.state = image.state * torch.nan
        return super().step(keys)


def run(runner: TorchRunner, jobs: list[Job]) -> list[Event]:
    events: list[Event] = []
    engine = Engine(runner, events.append, 4, 4, time.monotonic)
    for job in jobs:
        engine.submit(job)
    turn(engine)
    assert engine.speed.seconds_per_work > 0
    return events


@pytest.fixture
def jobs() -> list[Job]:
    size = {"width": 64, "height": 64, "guidance_scale": 1.0}
    return [make_job("a", steps=3, **size), make_job("b", steps=4, seed=1, n=2, **size)]


def pictures(events: list[Event]) -> dict[str, tuple[bytes, ...]]:
    return {event.job: event.images for event in events if isinstance(event, Done)}


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_job_whose_numbers_broke_runs_again_though_it_is_told_late(tiny: Path, jobs, at):
    expected = pictures(run(TorchRunner(Registry({"m": tiny}, load), (4,), invariant=True), jobs))
    assert pictures(run(LateRunner(tiny), jobs)) == expected
    events = run(LateRunner(tiny, at, times=1), jobs)
    assert pictures(events) == expected
    assert sum(event == Incident("non_finite", "step") for event in events) == 1


def test_a_job_whose_numbers_break_again_is_refused_alone(tiny: Path, jobs):
    events = run(LateRunner(tiny, at=4, times=9), jobs)
    assert outcomes(events) == {"a": "done", "b": "non_finite"}


def test_a_network_that_overflows_float16_runs_in_bfloat16():
    kept = prepare_for_device(tiny_model().to(dtype=torch.float16), CPU)
    assert (kept.unet.dtype, kept.autoencoder.dtype) == (torch.float16, torch.float16)
    loud = tiny_model()
    loud.autoencoder.decoder.conv_in.weight.mul_(5e4)
    loud = prepare_for_device(loud.to(dtype=torch.float16), CPU)
    assert (loud.unet.dtype, loud.autoencoder.dtype) == (torch.float16, torch.bfloat16)
    x = loud.sample(["a cat"], [0], 2, 3.0)
    assert x.isfinite().all()

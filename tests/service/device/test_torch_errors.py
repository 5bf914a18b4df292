"""torch's exceptions become the service's own."""

from __future__ import annotations

import time

import pytest
import torch

from service.device.torch_errors import translate_device_lost, translate_oom
from service.engine.engine import Engine
from service.engine.events import Event
from service.errors import DeviceLost, OutOfMemory
from service.worker.faults import FaultyRunner, read_faults
from tests.helpers.fake_runner import CountingRunner, make_job, outcomes


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


def test_another_error_is_passed_on():
    with pytest.raises(RuntimeError, match="shapes"), translate_device_lost():
        raise RuntimeError("shapes do not fit")


def tick_to_the_end(engine: Engine) -> None:
    while engine.busy:
        engine.tick()


@pytest.mark.parametrize("stage", ["start", "step", "decode"])
def test_a_lost_device_ends_the_loop_and_no_job(stage):
    events: list[Event] = []
    runner = FaultyRunner(CountingRunner((4,)), read_faults(f"{stage}:device:poison"))
    engine = Engine(runner, events.append, 4, 4, time.monotonic)
    engine.submit(make_job("a", prompt="poison"))
    with pytest.raises(DeviceLost):
        tick_to_the_end(engine)
    assert not outcomes(events)

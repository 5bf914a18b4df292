"""torch's exceptions become the service's own."""

from __future__ import annotations

import re
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
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
        "CUDA driver error: device-side assert triggered",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_a_device_that_fails_for_good_is_lost(message, kind):
    first_line = re.escape(message.splitlines()[0])
    with pytest.raises(DeviceLost, match=first_line), translate_device_lost(), translate_oom():
        raise kind(message)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
    ],
)
def test_a_device_without_memory_is_not_lost(message):
    with pytest.raises(OutOfMemory), translate_device_lost(), translate_oom():
        raise RuntimeError(message)


@pytest.mark.parametrize(
    "message",
    [
        "shapes do not fit",
        "CUDA error: invalid configuration argument",
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul(...)`",
        "Triton Error [CUDA]: invalid argument",
        "cuDNN Frontend error: No execution plans support the graph.",
    ],
)
def test_an_error_of_one_call_is_passed_on(message):
    with pytest.raises(RuntimeError, match=re.escape(message)), translate_device_lost(), translate_oom():
        raise RuntimeError(message)


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

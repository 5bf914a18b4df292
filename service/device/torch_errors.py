"""Translation of torch's exceptions to the service's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from service.errors import DeviceLost, OutOfMemory

# RuntimeErrors that mean "out of memory": on a CPU, and on a CUDA device outside torch's own allocator.
OOM_MESSAGES = (
    "DefaultCPUAllocator",
    "could not allocate",
    "Cannot allocate memory",  # when a file cannot be mapped
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
CUDA_FAILURE = "CUDA error"  # part of each message after which this process cannot use the device any more


@contextmanager
def translate_oom() -> Iterator[None]:
    """Raise the service's OutOfMemory wherever torch or Python runs out of memory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory from error
    except RuntimeError as error:
        if is_oom(error):
            raise OutOfMemory from error
        raise


@contextmanager
def translate_device_lost() -> Iterator[None]:
    """Raise DeviceLost where a CUDA device has failed for good: an illegal address, an assertion in a kernel.

    CUDA reports such an error asynchronously, at any later call, so it cannot be attributed to a job.
    """
    try:
        yield
    except RuntimeError as error:
        if CUDA_FAILURE in str(error) and not is_oom(error):
            raise DeviceLost(str(error).splitlines()[0]) from error
        raise


def is_oom(error: RuntimeError) -> bool:
    return any(message in str(error) for message in OOM_MESSAGES)

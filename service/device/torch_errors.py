"""Translation of torch's exceptions to the service's errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from service.errors import DeviceLost, OutOfMemory

# Parts of the messages of RuntimeErrors that mean "out of memory", beside torch.OutOfMemoryError.
OOM_MESSAGES = (
    "DefaultCPUAllocator",
    "could not allocate",
    "Cannot allocate memory",  # when a file cannot be mapped
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS found no memory for its handle
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN had no memory for any
)

# Parts of messages after which this process cannot use the device any more...
CUDA_FAILURES = (
    "CUDA error",
    "CUDA driver error",
    "Triton Error [CUDA]",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
)
# ... unless one of these is in the message too: the device refused one call, and the next ones work.
REFUSED_CALLS = (
    "invalid configuration argument",
    "invalid argument",
    "no kernel image is available",
    "too many resources requested for launch",
    "CUBLAS_STATUS_INVALID_VALUE",
    "CUBLAS_STATUS_NOT_SUPPORTED",
)


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
        if is_device_lost(error):
            raise DeviceLost(str(error).splitlines()[0]) from error
        raise


def is_oom(error: Exception) -> bool:
    """Whether the error means that memory ran out."""
    return contains_any(str(error), OOM_MESSAGES)


def is_device_lost(error: Exception) -> bool:
    """Whether the error means that this process cannot use its CUDA device any more."""
    message = str(error)
    return contains_any(message, CUDA_FAILURES) and not contains_any(message, REFUSED_CALLS + OOM_MESSAGES)


def contains_any(text: str, parts: Iterable[str]) -> bool:
    return any(part in text for part in parts)

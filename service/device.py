"""The device: which one, in which type of numbers, and how much of its memory a call takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from service.errors import OutOfMemory
from service.memory import HostMemory, Use

HOST_MESSAGES = ("DefaultCPUAllocator", "could not allocate")  # torch has no exception of its own for these


def choose_device(name: str) -> torch.device:
    """The device of a setting; raises ValueError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name}; {torch.cuda.device_count()} CUDA devices are visible")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of a setting; auto is the fast one of the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (AMX or AVX512-BF16)."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    probes = (getattr(torch.cpu, name, None) for name in names)
    return any(probe is not None and probe() for probe in probes)


class CudaMemory:
    """Memory of a CUDA device, as torch's allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0

    def used(self) -> int:
        """Bytes that this process holds of it. Asks the allocator alone: the driver may be capturing."""
        return torch.cuda.memory_reserved(self.device)

    def total(self) -> int:
        """Bytes that it has."""
        return torch.cuda.get_device_properties(self.device).total_memory

    def reset(self) -> None:
        """Models have come or gone: give back what they leave."""
        torch.cuda.empty_cache()

    def begin(self) -> bool:
        """Before a call that is to be measured."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)
        return True

    def end(self, rows: int, room: int) -> Use:
        """After it; room: bytes that calls may take, 0 for what the device has."""
        peak = torch.cuda.max_memory_allocated(self.device) - self._before
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return Use(rows, peak, room or torch.cuda.mem_get_info(self.device)[0] + kept)


def memory_of(device: torch.device) -> CudaMemory | HostMemory:
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


@contextmanager
def out_of_memory_refused() -> Iterator[None]:
    """Raise OutOfMemory, which has an answer of its own, where torch finds no memory on its device."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory from error
    except RuntimeError as error:
        if any(message in str(error) for message in HOST_MESSAGES):
            raise OutOfMemory from error
        raise


def free_cache() -> None:
    """Give back what torch keeps for later, so that the next try has all there is."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def fix_arithmetic(threads: int, invariant: bool) -> None:
    """Choose the number of threads (0: as many as torch likes), and for `invariant` leave no bit to chance.

    What was found on a CPU, with a small UNet of convolutions, attention and norms, and is kept from
    happening here and in TorchRunner:
    - the number of rows changes a row's bits in float32 (1e-6 of values near 1), at 1, 2, 4, 8 and 16 rows,
      with one thread as with two; so does D with one picture against many. So: one bucket, one picture.
    - a row's place in a call and its neighbours change nothing with 1 and with 2 threads. With 3 threads its
      place does: work is cut in equal parts, a part that ends within a vector has its last numbers computed
      one by one, and exp() is another function there. So: a power of two threads, which cuts evenly.
    - 1 and 2 threads agree with each other at some sizes only; a picture is the same where this number is.
    - an input at an odd address changes nothing, channels_last does (2e-6): nothing here is channels_last.
    - in bfloat16, with one thread on a CPU with AVX512-BF16, neither rows nor places changed a bit of that
      UNet; with AMX one row and many differ by 1%. It is treated as float32 is.
    """
    if threads:
        torch.set_num_threads(threads)
    if invariant:
        torch.set_num_threads(even(torch.get_num_threads()))
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may differ between calls
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False


def even(threads: int) -> int:
    """The largest power of two that is not more."""
    return 2 ** (threads.bit_length() - 1)

"""The device: which one, in which type of numbers, and how much of its memory a call takes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from service.engine.row_limits import HostMemory, Use
from service.errors import DeviceLost, OutOfMemory

# torch has no exception of its own for these: of a CPU, and of a CUDA device outside of torch's allocator.
MEMORY_MESSAGES = (
    "DefaultCPUAllocator",
    "could not allocate",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
LOSS = "CUDA error"  # after which a process can do nothing more with the device
ENDS = (0.02, 0.98)  # of the schedule, where networks are tried

Owner = TypeVar("Owner")


def choose_device(name: str) -> torch.device:
    """The device of a setting; raises ValueError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name}; {torch.cuda.device_count()} CUDA devices are visible")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # kernels and streams are those of the device of now
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of a setting; auto is the fast one of the device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if cpu_is_faster_in_bfloat16() else torch.float32


def cpu_is_faster_in_bfloat16() -> bool:
    """With AMX, or with AVX512-BF16 on a CPU that is not Intel's.

    Intel's AVX512-BF16 alone is slower than float32: large products 0.16 against 0.32 TFLOP/s, the model in
    the box 0.96 s against 0.68 a picture, on two cores of a Xeon (2026-11-26). By what the CPU is and not by
    a measurement, which a busy machine could turn: a worker that starts again must choose the same.
    """
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    amx, avx512 = (getattr(torch.cpu, name, bool)() for name in names)
    return amx or (avx512 and "GenuineIntel" not in cpu_vendor())


def cpu_vendor() -> str:
    """Text with the vendor's name in it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return platform.processor()


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
        if any(message in str(error) for message in MEMORY_MESSAGES):
            raise OutOfMemory from error
        raise


@contextmanager
def loss_told() -> Iterator[None]:
    """Raise DeviceLost where a CUDA device has failed for good: an illegal address, an assertion in a kernel.

    Such an error is told at any later call, so it is nobody's in particular.
    """
    try:
        yield
    except RuntimeError as error:
        if LOSS in str(error) and not any(message in str(error) for message in MEMORY_MESSAGES):
            raise DeviceLost(str(error).splitlines()[0]) from error
        raise


def upload(x: Tensor, device: torch.device) -> Tensor:
    """To the device, without a wait for what it is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def download(x: Tensor) -> Tensor:
    """To the CPU, through memory that a device writes at full speed."""
    if x.device.type != "cuda":
        return x.cpu()
    here = to_pinned(x)
    torch.cuda.current_stream(x.device).synchronize()
    return here


def to_pinned(x: Tensor) -> Tensor:
    """A copy under way to the CPU; what it holds counts when the stream has come so far."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class Clock:
    """A point of a CPU's time."""

    def __init__(self) -> None:
        self.now = time.perf_counter()

    def until(self, end: Clock) -> float:
        """Seconds."""
        return end.now - self.now

    def wait(self) -> None:
        """It has been."""


class CudaClock:
    """A point of the stream of calls to a CUDA device."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def until(self, end: CudaClock) -> float:
        """Seconds, once the end has been waited for."""
        return self.event.elapsed_time(end.event) / 1000

    def wait(self) -> None:
        """Until the device has come so far."""
        self.event.synchronize()


@dataclass(frozen=True)
class Asked(Generic[Owner]):
    """What a call will have said: of each row whether it is fine, and when it began and ended."""

    owners: Sequence[Owner]
    fine: Tensor  # (I,) bool, on the CPU
    begin: Clock | CudaClock
    end: Clock | CudaClock


class Verdicts(Generic[Owner]):
    """Which calls gave numbers that are none, and how long they took; without a wait for the call of now.

    Late: a call's verdict is given with the next call, or when it is settled. So a CUDA device always has a
    call to go on with.
    """

    def __init__(self, device: torch.device, late: bool | None = None) -> None:
        self.cuda = device.type == "cuda"
        self.late = self.cuda if late is None else late
        self.seconds: float | None = None  # of the last call whose verdict is known, where those are late
        self._asked: Asked[Owner] | None = None

    def now(self) -> Clock | CudaClock:
        return CudaClock() if self.cuda else Clock()

    def give(self, owners: Sequence[Owner], fine: Tensor, begin: Clock | CudaClock) -> list[Owner]:
        """A call's flags, (I,) bool, asked for; returns whose numbers are none, as far as is known."""
        before = self._asked
        self._asked = Asked(owners, to_pinned(fine) if self.cuda else fine, begin, self.now())
        return self._read(before) if self.late else self.settle()

    def settle(self) -> list[Owner]:
        """The same of the last call."""
        last, self._asked = self._asked, None
        return self._read(last)

    def _read(self, asked: Asked[Owner] | None) -> list[Owner]:
        if asked is None:
            return []
        asked.end.wait()
        self.seconds = asked.begin.until(asked.end) if self.late else None
        return [owner for owner, fine in zip(asked.owners, asked.fine.tolist(), strict=True) if not fine]


def suited(bundle: LatentDiffusion, device: torch.device) -> LatentDiffusion:
    """A loaded bundle as the device runs it best; the same one.

    On CUDA in channels_last, which its convolutions want. In bfloat16 what overflows in float16: found here
    and not at a picture, for whose numbers it would count what was made before it.
    """
    networks = [network for network in (bundle.unet, bundle.autoencoder) if network is not None]
    if device.type == "cuda":
        for network in networks:
            network.to(memory_format=torch.channels_last)
    for network, tried in ((bundle.unet, try_unet), (bundle.autoencoder, try_decoder)):
        if network is not None and network.dtype == torch.float16 and not tried(bundle).isfinite().all():
            network.to(torch.bfloat16)
    return bundle


@torch.inference_mode()
def try_unet(bundle: LatentDiffusion) -> Tensor:
    """What the UNet makes of noise, near both ends of the schedule."""
    spec, device = bundle.spec.unet, bundle.device
    draw = torch.Generator().manual_seed(0)

    def noise(*sizes: int) -> Tensor:
        return torch.randn(2, *sizes, generator=draw).to(device)

    defaults = bundle.spec.defaults
    _, *size = bundle.spec.latent_shape(defaults.width, defaults.height)
    t = torch.tensor([end * len(bundle.schedule.alpha_bar) for end in ENDS], device=device)
    context = noise(*bundle.spec.context_shape) if bundle.spec.context_shape else None
    pooled = noise(spec.added_width) if spec.added_width else None
    return bundle.unet(noise(spec.in_channels, *size), t, context, pooled, bundle.noise_levels([0, 0]))


@torch.inference_mode()
def try_decoder(bundle: LatentDiffusion) -> Tensor:
    """What D makes of noise."""
    defaults = bundle.spec.defaults
    shape = bundle.spec.latent_shape(defaults.width, defaults.height)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return bundle.decode(noise.to(bundle.device))


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
    - with 2 threads on an AMD EPYC a row's place changes what MKL makes of a product, unless MKL_CBWR asks
      for strict reproducibility before the first one.
    - 1 and 2 threads agree with each other at some sizes only; a picture is the same where this number is.
    - an input at an odd address changes nothing, channels_last does (2e-6): no CPU has any of it.
    - in bfloat16, with one thread on a CPU with AVX512-BF16, neither rows nor places changed a bit of that
      UNet; with AMX one row and many differ by 1%. It is treated as float32 is.
    """
    torch.backends.cudnn.allow_tf32 = False  # float32 is what float16 is held against
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # sums that overflow are none
    if threads:
        torch.set_num_threads(threads)
    if invariant:
        torch.set_num_threads(even(torch.get_num_threads()))
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may differ between calls
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False


def even(threads: int) -> int:
    """The largest power of two that is not more."""
    return 2 ** (threads.bit_length() - 1)

"""The memory of a device, and the memory that a call uses."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from service.engine.row_limits import MemoryUse


class CudaMemory:
    """Memory of a CUDA device, as torch's allocator counts it.

    exact: a measurement of a call need not be repeated.
    """

    exact = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._allocated_before = 0

    def used(self) -> int:
        """Bytes that this process holds, from the allocator: the driver may be busy capturing a graph."""
        return torch.cuda.memory_reserved(self.device)

    def total(self) -> int:
        """Bytes of the whole device."""
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def reset(self) -> None:
        """Give unused cached memory back; call it after models were loaded or unloaded."""
        torch.cuda.empty_cache()

    def begin(self) -> bool:
        """Start to measure a call; returns True: measuring is always possible here."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self._allocated_before = torch.cuda.memory_allocated(self.device)
        return True

    def end(self, rows: int, room: int, recorded: int = 0) -> MemoryUse:
        """What the call since begin() took.

        room: bytes that calls may take, 0 for all that is free; recorded: bytes of graphs, whose memory the
        allocator counts as cached, but gives to no other call.
        """
        peak = torch.cuda.max_memory_allocated(self.device) - self._allocated_before
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        return MemoryUse(rows, peak, room or free + max(cached - recorded, 0))


class HostMemory:
    """Memory of this process as Linux reports it; on other systems nothing is measured.

    The allocator keeps the pages of past calls and reuses them, which cannot be observed. So a call's peak is
    the difference to the smallest size of the process since the models were loaded, which may be too large a
    value but never too small a one.
    """

    exact = False

    def __init__(self) -> None:
        self._smallest: int | None = None

    def used(self) -> int:
        """Bytes of this process; 0 if unknown."""
        try:
            return read_kilobytes("/proc/self/status", "VmRSS")
        except OSError:
            return 0

    def total(self) -> int:
        """Bytes of the machine, or of the process's control group if that has fewer; 0 if unknown."""
        try:
            return int(min(read_kilobytes("/proc/meminfo", "MemTotal"), cgroup_limit()))
        except OSError:
            return 0

    def reset(self) -> None:
        """Forget the smallest size; call it after models were loaded or unloaded."""
        self._smallest = None

    def begin(self) -> bool:
        """Start to measure a call; returns whether measuring is possible."""
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is used now
            now = read_kilobytes("/proc/self/status", "VmRSS")
        except OSError:
            return False
        self._smallest = now if self._smallest is None else min(self._smallest, now)
        return True

    def end(self, rows: int, room: int, recorded: int = 0) -> MemoryUse:
        """What the call since begin() took; `room`: bytes that calls may take, 0 for all that is free."""
        smallest = self._smallest or 0
        peak = read_kilobytes("/proc/self/status", "VmHWM") - smallest
        reusable = read_kilobytes("/proc/self/status", "VmRSS") - smallest
        return MemoryUse(rows, peak, room or available() + reusable)


def memory_of(device: torch.device) -> CudaMemory | HostMemory:
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


def free_cache() -> None:
    """Free the memory that torch caches for later calls."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def read_kilobytes(file: str, name: str) -> int:
    """The value of a line `name: N kB` of a file under /proc, in bytes; 0 without one. Raises OSError."""
    lines = Path(file).read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":")), 0)


def available() -> int:
    """Bytes that the machine, or the control group of this process, can still give."""
    free = read_kilobytes("/proc/meminfo", "MemAvailable")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))


def cgroup_limit() -> float:
    """Bytes that the control group of this process may use; infinite without a limit."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text().strip().replace("max", "inf"))
    except (OSError, ValueError):
        return math.inf

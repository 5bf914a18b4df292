"""Detection of NaN and Inf values in the results of calls, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from models.transfer import start_download

Owner = TypeVar("Owner")


class TimePoint(Protocol):
    """A point in the device's sequence of calls."""

    def wait(self) -> None:
        """Wait until the device has reached this point."""

    def reached(self) -> bool:
        """Whether the device has reached this point."""

    def seconds_since(self, begin: TimePoint) -> float:
        """Seconds between two points that the device has reached."""


class CpuTimePoint:
    """The time at which it was made: a CPU has finished all calls by then."""

    def __init__(self) -> None:
        self.now = time.perf_counter()

    def wait(self) -> None:
        """Nothing to wait for."""

    def reached(self) -> bool:
        return True

    def seconds_since(self, begin: TimePoint) -> float:
        assert isinstance(begin, CpuTimePoint)
        return self.now - begin.now


class CudaTimePoint:
    """A point in the current stream of a CUDA device."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def wait(self) -> None:
        self.event.synchronize()

    def reached(self) -> bool:
        return bool(self.event.query())

    def seconds_since(self, begin: TimePoint) -> float:
        assert isinstance(begin, CudaTimePoint)
        return float(begin.event.elapsed_time(self.event)) / 1000


@dataclass(frozen=True)
class PendingCheck(Generic[Owner]):
    """A call whose result has not been checked yet."""

    owners: Sequence[Owner]
    finite: Tensor  # (I,) bool, on the CPU once `end` is reached
    begin: TimePoint
    end: TimePoint


class FiniteChecker(Generic[Owner]):
    """Reports the owners of non-finite results, and the duration of calls.

    With `late` (the default on CUDA), the next submit() or flush() reports on a call. So the device always
    has a call queued and never waits for the CPU.
    """

    def __init__(self, device: torch.device, late: bool | None = None) -> None:
        self.cuda = device.type == "cuda"
        self.late = self.cuda if late is None else late
        self.seconds: float | None = None  # duration of the last reported call; None unless late
        self.pending: PendingCheck[Owner] | None = None  # the last call, if it is not reported yet

    def now(self) -> TimePoint:
        return CudaTimePoint() if self.cuda else CpuTimePoint()

    def submit(self, owners: Sequence[Owner], finite: Tensor, begin: TimePoint) -> list[Owner]:
        """Submit a call's flags (I,) bool, one per owner; returns the owners with non-finite results.

        With `late`, those of the call before.
        """
        previous = self.pending
        self.pending = PendingCheck(owners, start_download(finite), begin, self.now())
        return self._report(previous) if self.late else self.flush()

    def flush(self) -> list[Owner]:
        """Wait for the last call and report on it."""
        last, self.pending = self.pending, None
        return self._report(last)

    def _report(self, check: PendingCheck[Owner] | None) -> list[Owner]:
        if check is None:
            return []
        check.end.wait()
        self.seconds = check.end.seconds_since(check.begin) if self.late else None
        flags = check.finite.tolist()
        return [owner for owner, finite in zip(check.owners, flags, strict=True) if not finite]

"""How many rows of a group fit in memory, learnt from calls. Knows no torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cachetools import LRUCache

GROUPS = 4096  # of which something is remembered: the last ones, since requests choose sizes and LoRAs
SHARE = 0.9  # of what is free; the rest is for what else a call's neighbourhood needs
RECOVERY = 64  # calls without a failure, after which a size that failed is tried again


@dataclass(frozen=True)
class Use:
    """What one call took: rows run, bytes at its peak, and bytes that calls may take in all."""

    rows: int
    peak: int
    room: int


@dataclass
class Fit:
    """What is known of one group: the size that its memory allows, and the one that failures allow."""

    measured: int
    allowed: int
    known: bool = False  # whether a call has told what it takes, or that it cannot be told
    calm: int = 0  # calls since the last failure, or since the last step of the recovery


class Limits:
    """The most rows of a call of each group, out of the sizes that calls are padded to.

    A group begins with the smallest size, whose first call tells what a row takes; a size that runs out of
    memory is not used again before RECOVERY calls have gone well.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.fits: LRUCache[Hashable, Fit] = LRUCache(GROUPS)

    def rows(self, group: Hashable) -> int:
        """The most rows that a call may have."""
        fit = self.fits.get(group)
        return min(fit.measured, fit.allowed) if fit else self.sizes[-1]

    def cautious(self, group: Hashable) -> None:
        """Begin small with a group that nothing is known of."""
        self.fits.setdefault(group, Fit(self.sizes[0], self.sizes[-1]))

    def passed(self, group: Hashable, use: Use | None = None) -> None:
        """A call went well; use: if it was measured."""
        fit = self.fits.get(group)
        if not fit:
            return
        if use:
            fit.measured = self._under(use.room * SHARE * use.rows / max(use.peak, 1))
        elif not fit.known:
            fit.measured = self.sizes[-1]
        fit.known = True
        if fit.allowed < self.sizes[-1]:
            fit.calm += 1
            if fit.calm >= RECOVERY:
                fit.calm, fit.allowed = 0, next(size for size in self.sizes if size > fit.allowed)

    def failed(self, group: Hashable, rows: int) -> None:
        """A call of so many rows ran out of memory."""
        fit = self.fits.setdefault(group, Fit(self.sizes[-1], self.sizes[-1], known=True))
        fit.calm, fit.allowed = 0, min(fit.allowed, self._under(rows - 1))

    def _under(self, rows: float) -> int:
        """The largest size of at most so many rows; 1, which means one image a call, below them all."""
        return max((size for size in self.sizes if size <= rows), default=1)


class HostMemory:
    """Memory of this process, as Linux tells it; peak() is None where it does not.

    The allocator keeps pages that a call had, and the next may take them without any sign. So a call's peak
    is counted from the smallest that the process has been since the models were loaded: too much, never too
    little.
    """

    def __init__(self) -> None:
        self._rest: int | None = None

    def used(self) -> int:
        """Bytes that this process has; 0 where nobody tells."""
        try:
            return read_kilobytes("/proc/self/status", "VmRSS")
        except OSError:
            return 0

    def total(self) -> int:
        """Bytes that the machine, or the process's control group, has; 0 where nobody tells."""
        try:
            return min(read_kilobytes("/proc/meminfo", "MemTotal"), group_limit())
        except OSError:
            return 0

    def reset(self) -> None:
        """Call it when models come or go."""
        self._rest = None

    def begin(self) -> bool:
        """Before a call that is to be measured; False where nothing can be."""
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is used now
            now = read_kilobytes("/proc/self/status", "VmRSS")
        except OSError:
            return False
        self._rest = now if self._rest is None else min(self._rest, now)
        return True

    def end(self, rows: int, room: int) -> Use:
        """After it; room: bytes that calls may take, 0 for what the machine has."""
        peak = read_kilobytes("/proc/self/status", "VmHWM") - self._rest
        held = read_kilobytes("/proc/self/status", "VmRSS") - self._rest  # the next call may have it again
        return Use(rows, peak, room or available() + held)


def read_kilobytes(file: str, name: str) -> int:
    """A line `name: N kB` of a file under /proc, in bytes; 0 without one. Raises OSError."""
    lines = Path(file).read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":")), 0)


def available() -> int:
    """Bytes that this machine, or the control group that the process is in, can still give."""
    free = read_kilobytes("/proc/meminfo", "MemAvailable")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(int(limit) - used, 0))


def group_limit() -> float:
    """Bytes that the control group may have; infinite without a limit."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text().strip().replace("max", "inf"))
    except (OSError, ValueError):
        return float("inf")

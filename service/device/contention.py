"""Fewer CPU threads while other programs use the cores.

torch's threads (GNU OpenMP) spin while they wait for each other. While one of them waits for a core, the
others spin in vain, so that beside another program one thread less is several times faster
(tests/benchmarks/threads.txt).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)

WINDOW_SECONDS = 0.5  # over which usage is measured
QUIET_SECONDS = 3.0  # without contention, until there are more threads again
BUSY_FIELDS = (1, 3, 6, 7)  # user, system, irq, softirq; programs with a nice level yield to this one


class Usage(NamedTuple):
    """CPU seconds at a time: `busy` of all programs on the CPUs of this process, `own` of this process."""

    now: float
    busy: float
    own: float


class SparingThreads:
    """Keeps the number of torch's threads at the number of CPUs that other programs leave free.

    most: threads without contention. read: the usage of `cpus` CPUs, None where it is unknown.
    """

    def __init__(self, most: int, cpus: int, read: Callable[[], Usage | None]) -> None:
        self.most, self.cpus, self.number = most, cpus, most
        self._read, self._last = read, read()
        self._contended = 0.0  # when others needed CPUs last

    def adapt(self, now: float) -> None:
        """Set the number of threads; to be called before each UNet call."""
        if self._last is None or now - self._last.now < WINDOW_SECONDS:
            return
        before, self._last = self._last, self._read()
        if self._last is None:
            return
        wanted = self.wanted(before, self._last)
        if wanted <= self.number:
            self._contended = self._last.now
        elif self._last.now - self._contended < QUIET_SECONDS:
            return
        if wanted != self.number:
            log.debug("threads: %d instead of %d, for other programs' use of CPUs", wanted, self.number)
            self.number = wanted
            torch.set_num_threads(wanted)

    def wanted(self, before: Usage, after: Usage) -> int:
        """The number of threads for which other programs leave CPUs, at least 1."""
        seconds = after.now - before.now
        others = ((after.busy - before.busy) - (after.own - before.own)) / seconds
        return min(self.most, max(1, round(self.cpus - others)))


def sparing_threads() -> SparingThreads | None:
    """For this process's threads; None where there is only one, or the usage is unknown."""
    most = torch.get_num_threads()
    if most == 1 or not hasattr(os, "sched_getaffinity"):
        return None
    cpus = os.sched_getaffinity(0)
    threads = SparingThreads(most, len(cpus), lambda: read_usage(cpus))
    return threads if read_usage(cpus) else None


def read_usage(cpus: Collection[int], file: str = "/proc/stat") -> Usage | None:
    """The usage of these CPUs since the system's start; None where it is unknown."""
    names = {f"cpu{number}" for number in cpus}
    try:
        with open(file, encoding="ascii") as stream:
            lines = [line.split() for line in stream]
        ticks = sum(int(fields[place]) for fields in lines if fields[0] in names for place in BUSY_FIELDS)
    except (OSError, ValueError, IndexError):
        return None
    return Usage(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())

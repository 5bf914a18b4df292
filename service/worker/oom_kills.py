"""How many processes the kernel has killed because memory ran out, as far as this process can see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")  # lines of number:controllers:path
MACHINE = Path("/proc/vmstat")


def count_oom_kills() -> int | None:
    """The kills in this process's control group, or on the whole machine if no group counts them.

    None if neither can be read.
    """
    return next((count for file in counters() if (count := read_count(file)) is not None), None)


def counters() -> Iterator[Path]:
    """The files that may have a line "oom_kill N", the most specific first."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield CGROUPS / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            yield CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control"
    yield CGROUPS / "memory.events"  # inside a container, where the path is the host's
    yield CGROUPS / "memory/memory.oom_control"
    yield MACHINE


def read_count(file: Path) -> int | None:
    """The number on the file's line "oom_kill N"; None without one."""
    try:
        words = (line.split() for line in file.read_text().splitlines())
        return next((int(line[1]) for line in words if line[:1] == ["oom_kill"]), None)
    except (OSError, ValueError, IndexError):
        return None

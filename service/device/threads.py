"""The number of CPU threads: no more than the CPUs that this process may really use.

torch counts the cores of the host. In a container that may use 4 CPUs of 64, its 64 threads would mostly wait
for each other and be stopped by the kernel in the middle of every tensor operation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch's libraries read these variables


class Threads(NamedTuple):
    """A number of threads, and where it comes from, for the log."""

    number: int
    reason: str

    def share(self, processes: int) -> Threads:
        """The number for one of several processes on the same CPUs, at least 1."""
        if processes == 1:
            return self
        return Threads(max(1, self.number // processes), f"{self.reason}, shared by {processes} replicas")


class Host(NamedTuple):
    """What the process may use of its machine, in CPUs."""

    cpus: int
    affinity: int
    quota: float | None  # None: no limit


def choose_threads(setting: int, default: int, environ: Mapping[str, str], host: Host) -> Threads:
    """The setting if it is not 0, else the environment's number, else the smallest limit.

    `default`: torch's own choice, which already respects the environment. A quota of 1.5 CPUs gives one
    thread: a second one would use up the quota by waiting for the first (measured with the bundled model:
    34 and 28 s per image instead of 8.5 and 9.4 s, on two busy cores, 2026-11-30).
    """
    if setting:
        return Threads(setting, "from the setting threads")
    for variable in ENVIRONMENT:
        if environ.get(variable):
            return Threads(default, f"from {variable}")
    limits = [Threads(default, f"torch's default (host has {host.cpus} CPUs)")]
    if host.affinity < host.cpus:
        limits.append(
            Threads(host.affinity, f"from the CPU affinity of the process (host has {host.cpus} CPUs)")
        )
    if host.quota is not None:
        reason = f"from the cgroup's CPU quota of {host.quota:g} CPUs (host has {host.cpus})"
        limits.append(Threads(max(1, int(host.quota)), reason))
    # Of equal limits the last one, whose reason is the most specific.
    return min(reversed(limits), key=lambda threads: threads.number)


def read_host(root: Path = Path("/")) -> Host:
    """The limits of this process; `root`: where /proc and /sys are, for tests."""
    cpus = os.cpu_count() or 1
    # Not on every platform: macOS has no affinity.
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpus
    return Host(cpus, affinity, cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the cgroups of this process allow, fractions included; None without a limit.

    The smallest quota of the process's own cgroup and its ancestors, as far as they are visible, of cgroup v1
    and v2 alike. What cannot be read or parsed counts as no limit.
    """
    quotas = [quota for folder in cgroup_folders(root) if (quota := folder_quota(folder)) is not None]
    return min(quotas, default=None)


def cgroup_folders(root: Path) -> Iterator[Path]:
    """The folders of the process's CPU cgroups, each followed by its ancestors up to the mount point."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for membership in memberships:
        hierarchy, _, rest = membership.partition(":")
        controllers, _, path = rest.partition(":")
        if not path or (not controllers and hierarchy != "0"):
            continue  # not a line of this file
        for mount in mounts:
            if is_cpu_mount(mount, controllers):
                mount_root, mount_point = map(unescape, mount.split()[3:5])
                base = root / mount_point.lstrip("/")
                inner = inside(path, mount_root)
                yield from (base / part for part in (inner, *inner.parents))


def is_cpu_mount(mount: str, controllers: str) -> bool:
    """Whether a line of mountinfo mounts the hierarchy of these controllers, and they limit CPU time."""
    fields, _, rest = mount.partition(" - ")
    file_system, _, options = [*rest.split(), "", "", ""][:3]
    if len(fields.split()) < 5:
        return False
    if not controllers:  # cgroup v2: a single hierarchy for all controllers
        return file_system == "cgroup2"
    return file_system == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options.split(",")


def inside(path: str, mount_root: str) -> Path:
    """A cgroup's path relative to the mount; "." if it lies elsewhere (as seen from a cgroup namespace)."""
    try:
        relative = Path(path).relative_to(mount_root)
    except ValueError:
        return Path()
    return Path() if ".." in relative.parts else relative


def unescape(text: str) -> str:
    """A path of mountinfo, where spaces and the like are octal escapes."""
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escape, character)
    return text


def folder_quota(folder: Path) -> float | None:
    """The quota of one cgroup in CPUs; None without one."""
    try:
        if (folder / "cpu.max").exists():  # cgroup v2: "max 100000" or "50000 100000"
            quota, period = (folder / "cpu.max").read_text().split()
        else:  # cgroup v1: -1 without a limit
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        cpus = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cpus if cpus > 0 else None

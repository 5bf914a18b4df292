"""The number of CPU threads, from settings, the environment and a container's limits."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from service.device.loading import configure_cpu
from service.device.threads import Host, choose_threads, cpu_quota
from service.settings import Settings

HOST = Host(cpus=64, affinity=64, quota=None)

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
"""
V2_MOUNTS = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1(root: Path, path: str, quotas: dict[str, int], mount_root: str = "/") -> Path:
    """A /proc and /sys of cgroup v1; quotas: folder below the mount point -> cpu.cfs_quota_us."""
    base = "sys/fs/cgroup/cpu,cpuacct"
    files = {f"{base}/{folder}/cpu.cfs_quota_us": f"{quota}\n" for folder, quota in quotas.items()}
    files |= {f"{base}/{folder}/cpu.cfs_period_us": "100000\n" for folder in quotas}
    files["proc/self/cgroup"] = f"9:name=systemd:/\n4:memory:{path}\n1:cpu,cpuacct:{path}\n"
    files["proc/self/mountinfo"] = V1_MOUNTS.format(root=mount_root)
    return write(root, files)


def v2(root: Path, path: str, limits: dict[str, str], mount_root: str = "/") -> Path:
    """A /proc and /sys of cgroup v2; limits: folder below the mount point -> cpu.max."""
    files = {f"sys/fs/cgroup/{folder}/cpu.max": f"{limit}\n" for folder, limit in limits.items()}
    files["proc/self/cgroup"] = f"0::{path}\n"
    files["proc/self/mountinfo"] = V2_MOUNTS.format(root=mount_root)
    return write(root, files)


@pytest.mark.parametrize(
    ("path", "limits", "quota"),
    [
        ("/", {"": "50000 100000"}, 0.5),  # a container with a cgroup namespace of its own
        ("/pod/box", {"pod/box": "400000 100000", "pod": "max 100000"}, 4.0),
        ("/pod/box", {"pod/box": "max 100000", "pod": "150000 100000"}, 1.5),
        ("/pod/box", {"pod/box": "800000 100000", "pod": "200000 100000"}, 2.0),
        ("/pod/box", {"pod/box": "max 100000"}, None),
        ("/pod/box", {}, None),
        ("/../elsewhere", {"": "300000 100000"}, 3.0),  # outside the namespace: only the mount can be seen
        ("/", {"": "many 100000"}, None),
        ("/", {"": "50000 0"}, None),
        ("/", {"": ""}, None),
    ],
)
def test_quota_of_cgroup_v2_is_the_smallest_of_the_cgroup_and_its_ancestors(tmp_path, path, limits, quota):
    assert cpu_quota(v2(tmp_path, path, limits)) == quota


@pytest.mark.parametrize(
    ("path", "quotas", "mount_root", "quota"),
    [
        ("/", {"": 50000}, "/", 0.5),
        ("/", {"": -1}, "/", None),
        ("/docker/abc", {"docker/abc": 400000, "docker": -1, "": -1}, "/", 4.0),
        ("/docker/abc", {"docker/abc": 400000, "docker": 250000}, "/", 2.5),
        ("/docker/abc", {"": 100000}, "/docker/abc", 1.0),  # the container's own cgroup is mounted
        ("/docker/abc/inner", {"": 300000, "inner": 200000}, "/docker/abc", 2.0),
    ],
)
def test_quota_of_cgroup_v1(tmp_path, path, quotas, mount_root, quota):
    assert cpu_quota(v1(tmp_path, path, quotas, mount_root)) == quota


@pytest.mark.parametrize("file", ["cgroup", "mountinfo"])
@pytest.mark.parametrize("text", ["", "no such format", "a b - c", ":::\n - \n"])
def test_unreadable_tables_mean_no_limit(tmp_path, file, text):
    assert cpu_quota(write(v2(tmp_path, "/", {"": "50000 100000"}), {f"proc/self/{file}": text})) is None


def test_no_limit_where_there_are_no_cgroups(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("host", "count", "reason"),
    [
        (HOST, 32, "torch's default (host has 64 CPUs)"),
        (HOST._replace(quota=4.0), 4, "from the cgroup's CPU quota of 4 CPUs (host has 64)"),
        (HOST._replace(quota=0.5), 1, "from the cgroup's CPU quota of 0.5 CPUs (host has 64)"),
        (HOST._replace(quota=1.5), 1, "from the cgroup's CPU quota of 1.5 CPUs (host has 64)"),
        (HOST._replace(quota=48.0), 32, "torch's default (host has 64 CPUs)"),
        (HOST._replace(affinity=8), 8, "from the CPU affinity of the process (host has 64 CPUs)"),
        (HOST._replace(affinity=2, quota=4.0), 2, "from the CPU affinity of the process (host has 64 CPUs)"),
        (HOST._replace(affinity=8, quota=4.0), 4, "from the cgroup's CPU quota of 4 CPUs (host has 64)"),
    ],
)
def test_the_smallest_limit_decides_and_is_named(host, count, reason):
    assert choose_threads(0, 32, {}, host) == (count, reason)


def test_the_setting_and_the_environment_take_precedence():
    small = HOST._replace(quota=1.0)
    assert choose_threads(6, 32, {"OMP_NUM_THREADS": "3"}, small) == (6, "from the setting threads")
    assert choose_threads(0, 3, {"OMP_NUM_THREADS": "3"}, small) == (3, "from OMP_NUM_THREADS")
    assert choose_threads(0, 32, {"OMP_NUM_THREADS": ""}, small).number == 1


def test_start_logs_the_number_and_its_reason(caplog):
    before = torch.get_num_threads()
    with caplog.at_level(logging.INFO):
        configure_cpu(Settings(threads=3, invariant=False))
        assert torch.get_num_threads() == 3
        torch.set_num_threads(before)
    assert "threads: 3, from the setting threads" in caplog.messages

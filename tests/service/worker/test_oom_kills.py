"""Reading how many processes the kernel has killed for want of memory."""

from __future__ import annotations

import pytest

from service.worker import oom_kills


@pytest.fixture
def system(tmp_path, monkeypatch):
    """write(file name, text) under a folder that stands for /sys and /proc."""
    monkeypatch.setattr(oom_kills, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(oom_kills, "MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(oom_kills, "MACHINE", tmp_path / "vmstat")

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    return write


def test_nothing_is_known_without_a_counter(system):
    assert oom_kills.count_oom_kills() is None


def test_the_machine_counts_where_no_control_group_does(system):
    system("vmstat", "nr_free_pages 9\noom_kill 4\n")
    system("cgroup/memory.events", "low 0\noom 1\n")
    assert oom_kills.count_oom_kills() == 4


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/pod/a", "cgroup/pod/a/memory.events"),
        ("4:cpu,memory:/pod/a\n0::/", "cgroup/memory/pod/a/memory.oom_control"),
        ("0::/../other", "cgroup/memory.events"),
    ],
)
def test_the_own_control_group_counts_first(system, membership, file):
    system("self", membership)
    system("vmstat", "oom_kill 4\n")
    system(file, "oom_kill_disable 0\noom_kill 2\n")
    assert oom_kills.count_oom_kills() == 2


def test_the_counter_of_this_machine_can_be_read():
    assert oom_kills.count_oom_kills() is None or oom_kills.count_oom_kills() >= 0

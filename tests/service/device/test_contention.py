"""Fewer threads while other programs use the CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from models.checkpoint import load
from service.device.contention import SparingThreads, Usage, read_usage
from service.device.loading import may_spare_threads
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.settings import Settings
from tests.helpers.torch_runner import run_jobs, tiny_job

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


class Machine:
    """CPUs of which this process uses `own` and other programs `others`."""

    def __init__(self) -> None:
        self.usage = Usage(0.0, 0.0, 0.0)

    def pass_second(self, others: float, own: float = 2.0) -> float:
        now, busy, used = self.usage
        self.usage = Usage(now + 1, busy + others + own, used + own)
        return self.usage.now

    def threads(self, most: int, cpus: int) -> SparingThreads:
        return SparingThreads(most, cpus, lambda: self.usage)


@pytest.mark.parametrize(
    ("cpus", "others", "number"),
    [(2, 0.3, 2), (2, 1.0, 1), (2, 3.0, 1), (4, 1.0, 2), (4, 2.6, 1), (64, 50.0, 2), (64, 63.0, 1)],
)
def test_there_are_as_many_threads_as_free_cpus(cpus, others, number):
    machine = Machine()
    threads = machine.threads(2, cpus)
    threads.adapt(machine.pass_second(others))
    assert torch.get_num_threads() == threads.number == number


def test_a_runner_adapts_before_unet_calls(tiny: Path):
    usages = (Usage(second, 3.0 * second, 2.0 * second) for second in count())
    threads = SparingThreads(2, 2, lambda: next(usages))
    registry = Registry({"m": tiny}, lambda path: load(path))
    assert run_jobs(TorchRunner(registry, (2,), threads=threads), tiny_job())
    assert torch.get_num_threads() == 1


def test_threads_come_back_after_some_quiet_seconds():
    machine = Machine()
    threads = machine.threads(2, 2)
    numbers = []
    for others in (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0):
        threads.adapt(machine.pass_second(others, own=1.0))
        numbers.append(threads.number)
    assert numbers == [1, 1, 1, 1, 1, 1, 2, 2]


def test_usage_is_read_twice_a_second_at_most():
    reads = []
    threads = SparingThreads(2, 2, lambda: reads.append(1) or Usage(10.0, 0.0, 0.0))
    for _ in range(100):
        threads.adapt(10.4)
    assert len(reads) == 1


def test_an_unknown_usage_changes_nothing():
    threads = SparingThreads(2, 2, lambda: None)
    threads.adapt(1e9)
    assert threads.number == 2


def test_the_usage_of_some_cpus_is_read_without_that_of_nice_programs(tmp_path: Path):
    file = tmp_path / "stat"
    file.write_text("cpu 9 9 9 9 9 9 9 9\ncpu0 100 7 20 900 1 2 3 50 0 0\ncpu1 5 5 5 5 5 5 5 5 0 0\nintr 5\n")
    usage = read_usage({0}, str(file))
    assert usage is not None
    assert usage.busy * os.sysconf("SC_CLK_TCK") == 100 + 20 + 2 + 3
    assert read_usage({0}, str(tmp_path / "missing")) is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux only")
def test_another_program_is_seen():
    cpus = os.sched_getaffinity(0)
    before = read_usage(cpus)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(0.5)
        other.kill()
    after = read_usage(cpus)
    assert before is not None
    assert after is not None
    assert after.busy - before.busy - (after.own - before.own) > 0.05


@pytest.mark.parametrize(
    ("settings", "backend", "environ", "may"),
    [
        ({}, "torch", {}, True),
        ({"invariant": True}, "torch", {}, False),
        ({"threads": 2}, "torch", {}, False),
        ({}, "torch", {"OMP_NUM_THREADS": "2"}, False),
        ({}, "openvino", {}, False),
    ],
)
def test_a_number_that_was_given_or_is_promised_does_not_change(settings, backend, environ, may):
    assert may_spare_threads(Settings(**settings), backend, CPU, environ) == may

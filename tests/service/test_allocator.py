"""Freed memory of the API process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.helpers.environment import ROOT

# Large blocks, each followed by a small one that stays. Without the change, the large ones leave gaps.
PROGRAM = """
from pathlib import Path
from service.allocator import return_freed_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

{call}
first = bytearray(2**21)
del first  # from now on, glibc by default maps no block of this size by itself
before, large, small = resident_mib(), [], []
for _ in range(400):
    large.append(bytearray(100_000))
    small.append(bytearray(1000))
large.clear()
print(resident_mib() - before)
"""


def growth(call: str) -> float:
    """MiB that a process keeps after it has freed 40 MB."""
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_goes_back_to_the_operating_system():
    assert growth("pass") > 30, "this program shows the difference"
    assert growth("assert return_freed_memory()") < 5

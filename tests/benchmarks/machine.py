"""What a table of measurements says of the machine: its processor, its packages, and what else ran on it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

PACKAGES = ("torch", "diffusers", "openvino", "openvino_genai", "onnxruntime")


def processor() -> str:
    """The CPU's name, family and model, and which bfloat16 instructions it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    fields = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    supported = [kind for kind in ("amx_bf16", "avx512_bf16") if kind in fields.get("flags", "").split()]
    name = f"{fields.get('model name', platform.machine())}, family {fields.get('cpu family', '?')}"
    return f"{name} model {fields.get('model', '?')} ({', '.join(supported) or 'no bfloat16'})"


def heading() -> str:
    """Date, processor, threads and the versions of the packages that are installed."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES if is_installed(name))
    return f"{time.strftime('%Y-%m-%d')}, {processor()}, {torch.get_num_threads()} threads, {packages}"


def is_installed(package: str) -> bool:
    return find_spec(package) is not None


@dataclass
class Others:
    """The part of all cores' time that other programs had, from 0 to 1."""

    share: float = 0.0


@contextmanager
def others() -> Iterator[Others]:
    """Measures it while the context is open. Children of this process that still run are not others."""
    result, begin, busy, own = Others(), time.monotonic(), busy_seconds(), own_seconds()
    yield result
    total = (time.monotonic() - begin) * (os.cpu_count() or 1)
    result.share = max(0.0, busy_seconds() - busy - (own_seconds() - own)) / total


def busy_seconds() -> float:
    """Seconds that all cores have computed, for this machine or, if virtual, for others on the same host."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def own_seconds() -> float:
    """CPU seconds of this process and its living descendants."""
    this = psutil.Process()
    spent = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in spent)

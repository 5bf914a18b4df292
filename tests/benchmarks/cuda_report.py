"""The report of the GPU benchmark, written line by line, and sections with time limits.

A section runs in a process of its own, so that a lost device or an endless call costs that section alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

VERDICTS = {True: "ok", False: "BAD", None: "-"}
RESERVE_SECONDS = 5  # a section is stopped so long before the deadline, for the lines after it


@dataclass(frozen=True)
class Section:
    """A part of the benchmark. seconds: its expected duration; it is stopped after three times as many."""

    name: str
    shape: str  # empty for a section that has its own
    seconds: float

    @property
    def title(self) -> str:
        return f"{self.name} {self.shape}".strip()


class Report:
    """Prints lines and appends each to a file, if there is one, as a JSON object."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file

    def check(self, subject: str, what: str, fine: bool | None, figure: str = "") -> None:
        """Report a check. fine: None if it does not apply to this device."""
        line = f"{subject:10} {what:58} {VERDICTS[fine]:4} {figure}"
        self.write(line.rstrip(), subject=subject, check=what, fine=fine, figure=figure)

    def figure(self, text: str, **values: object) -> None:
        """Report a measurement."""
        self.write(f"  {text}", **values)

    def write(self, text: str, **values: object) -> None:
        print(text, flush=True)
        if self.file and values:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, default=str) + "\n")


def run_sections(
    sections: Iterable[Section],
    command: Callable[[Section], Sequence[str]],
    report: Report,
    deadline: float,
) -> bool:
    """Run the command of each section; returns whether all of them ended with exit status 0 or were skipped.

    deadline: seconds from now, after which no section runs; one that would not fit is skipped.
    """
    begin, fine = time.monotonic(), True
    for section in sections:
        left = deadline - (time.monotonic() - begin) - RESERVE_SECONDS
        if section.seconds > left:
            report.check(section.title, f"skipped: needs {section.seconds:.0f} s of {max(left, 0):.0f}", None)
            continue
        problem = run_one(command(section), min(3 * section.seconds, left))
        if problem:
            fine = False
            report.check(section.title, problem, False)
    return fine


def run_one(command: Sequence[str], seconds: float) -> str:
    """What went wrong with a command, which prints to our own output; empty if nothing did."""
    try:
        code = subprocess.run(command, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return "" if code == 0 else f"ended with exit status {code}"


def this_module(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package in a new process."""
    return [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]

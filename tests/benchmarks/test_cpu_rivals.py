"""The comparison of libraries on a CPU, on a small network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import cpu_rivals
from tests.benchmarks.cpu_rivals import Subject, compare
from tests.benchmarks.shapes import TINY


@pytest.mark.parametrize("part", ["unet", "D"])
def test_sides_with_the_same_weights_agree(part, tmp_path: Path, capsys):
    compare(Subject(TINY["sd15"].spec, part, 2, 8, tmp_path), ["torch", "diffusers", "ours"], 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ours", "torch", "diffusers"]
    assert "skipped: openvino is not installed" in lines[0]


def test_a_side_that_differs_is_not_timed(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(cpu_rivals, "MAX_ERROR", 1e-6)
    compare(Subject(TINY["sd15"].spec, "D", 1, 8, tmp_path), ["torch"], 1)
    assert "torch  not timed: its error is" in capsys.readouterr().out

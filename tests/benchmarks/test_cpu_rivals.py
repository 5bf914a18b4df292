"""The comparison of libraries on a CPU, on a small network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import cpu_rivals
from tests.benchmarks.cpu_rivals import Networks, Subject, compare
from tests.benchmarks.machine import own_seconds
from tests.benchmarks.shapes import TINY

SPEC = TINY["sd15"].spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["unet", "D"])
def test_sides_with_the_same_weights_agree(part, dtype, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(cpu_rivals, "is_installed", lambda package: False)
    compare(Subject(Networks(SPEC, part, dtype), 2, 8, tmp_path), ["torch", "diffusers", "ours", "onnx"], 1)
    lines = capsys.readouterr().out.splitlines()
    assert "ours  skipped: openvino is not installed" in lines[0]
    assert "onnx  skipped: onnx and onnxruntime is not installed" in lines[1]
    errors = {name: float(error) for name, _, _, error, _ in map(str.split, lines[2:4])}
    assert set(errors) == {"torch", "diffusers"}
    assert max(errors.values()) < (1e-5 if dtype == torch.float32 else 0.03)


def test_a_side_that_differs_is_not_timed(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(cpu_rivals, "MAX_ERROR", -1.0)
    compare(Subject(Networks(SPEC, "D", torch.float32), 1, 8, tmp_path), ["torch"], 1)
    assert "torch  not timed: its error is" in capsys.readouterr().out


def test_the_cpu_time_of_children_is_not_that_of_others():
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    before = own_seconds()
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        assert own_seconds() - before > 0.4
        child.communicate(b"\n")

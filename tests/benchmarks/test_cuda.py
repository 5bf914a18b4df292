"""The GPU benchmark on a CPU with a small network: its checks pass, can fail, and nothing ends it early."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.benchmarks import cuda, cuda_checks
from tests.benchmarks.cuda_report import Report, Section, run_sections
from tests.benchmarks.shapes import TINY, Setting
from tests.helpers.environment import ROOT

SETTING = Setting(torch.device("cpu"), torch.float32)
OPTIONAL = (
    "fastapi",
    "starlette",
    "uvicorn",
    "pydantic",
    "httpx",
    "prometheus_client",
    "diffusers",
    "triton",
)
IMPORT_WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import tests.benchmarks.cuda
"""


def results(shape="ldm-text"):
    return dict(cuda_checks.checks(TINY[shape], SETTING))


@pytest.mark.slow
def test_checks_that_apply_to_a_cpu_pass():
    found = results()
    assert {what for what, result in found.items() if result.fine is False} == set()
    assert {what for what, result in found.items() if result.fine} == {
        "eps against float32",
        "VAE decode against float32",
        "a whole image against float32",
        "--invariant: a row has the same bits with any others",
        "--invariant: an image has the same bits in any company",
    }


@pytest.mark.slow
def test_a_wrong_fast_path_is_found(monkeypatch):
    prepare_for_device = cuda_checks.prepare_for_device

    def prepare_wrongly(model, device):
        model = prepare_for_device(model, device)
        decode, eps = model.decode, model.denoiser
        monkeypatch.setattr(model, "decode", lambda z: decode(z) + 0.1)
        monkeypatch.setattr(model, "denoiser", lambda *inputs: 1.01 * eps(*inputs))
        return model

    monkeypatch.setattr(cuda_checks, "prepare_for_device", prepare_wrongly)
    bad = {what for what, result in results().items() if result.fine is False}
    assert bad == {"eps against float32", "VAE decode against float32", "a whole image against float32"}


def test_a_check_that_raises_leaves_the_others(monkeypatch):
    def fail(subject):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED\nmore")

    passing = lambda subject: cuda_checks.Result(True)  # noqa: E731
    monkeypatch.setattr(cuda_checks, "CHECKS", {"a": fail, "b": passing})
    assert results() == {
        "a": (False, "RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        "b": (True, ""),
    }


def test_the_benchmark_needs_no_package_of_the_api():
    code = IMPORT_WITHOUT.format(names=OPTIONAL)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_section_that_fails_or_never_ends_leaves_the_others(tmp_path, capsys):
    file = tmp_path / "lines.json"
    scripts = {
        "crash": "import os; os.abort()",
        "endless": "import time; time.sleep(60)",
        "fine": f"open({str(tmp_path / 'ran')!r}, 'w')",
        "long": f"open({str(tmp_path / 'not')!r}, 'w')",
    }
    seconds = {"crash": 5, "endless": 0.2, "fine": 5, "long": 1000}
    fine = run_sections(
        [Section(name, "", seconds[name]) for name in scripts],
        lambda section: [sys.executable, "-c", scripts[section.name]],
        Report(file),
        deadline=60,
    )
    assert not fine
    assert (tmp_path / "ran").exists()
    assert not (tmp_path / "not").exists()
    lines = {line["subject"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert {name: line["fine"] for name, line in lines.items()} == {
        "crash": False,
        "endless": False,
        "long": None,
    }
    assert "stopped after" in lines["endless"]["check"]


@pytest.mark.slow
def test_a_rehearsal_on_a_cpu_runs_and_writes_every_section(tmp_path):
    file = tmp_path / "lines.json"
    options = ["--tiny", "--device", "cpu", "--dtype", "float32", "--shapes", "ldm-text", "--steps", "2"]
    sections = ["--only", "faults", "speed", "--json", str(file)]
    run = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.cuda", *options, *sections],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert "torch" in lines[0]["heading"]
    assert sum("check" in line for line in lines) == 4
    assert [line["at_once"] for line in lines if "at_once" in line] == list(cuda.cuda_speed.IMAGES[:2])

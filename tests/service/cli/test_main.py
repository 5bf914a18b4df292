"""The `ldm` command: its entry point, its arguments and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from service.cli.main import main, parser
from service.cli.options import SETTINGS, settings_of
from tests.helpers.environment import ROOT
from tests.helpers.servers import write_import_trap


@pytest.mark.slow
def test_the_installed_command_imports_nothing_from_the_current_directory(tmp_path, tiny):
    """And the image that it writes holds its parameters."""
    write_import_trap(tmp_path)
    command = [sys.executable, "-P", "-m", "service.cli", "generate", "red apple", "--seed", "7"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LDM_DTYPE": "float32"}
    done = subprocess.run(
        [*command, "--model", str(tiny), "-o", "apple.png"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "apple.png  seed 7\n"), done.stderr
    assert done.stderr.startswith("ldm: threads: 1, from OMP_NUM_THREADS\n")
    with Image.open(tmp_path / "apple.png") as image:
        parameters = json.loads(image.text["parameters"])
        assert image.size == (64, 64)
    assert (parameters["prompt"], parameters["seed"]) == ("red apple", 7)


def test_a_reader_of_stdout_that_leaves_causes_no_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "service.cli", "settings"]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("generate p -o p.bmp --model TINY", "--output"),
        ("generate p -o nowhere/p.png --model TINY", "--output"),
        ("generate p -o p.png --model nowhere", "nowhere"),
        ("generate p -o p.png --model TINY --steps 5000", "steps"),
        ("generate p -o p.png --model TINY --width 65", "width"),
        ("generate -o p.png --model TINY", "prompt"),
        ("generate p -o p.png --model TINY --strength 0.5", "strength"),
        ("generate p -o p.png --model TINY --init-image no.png", "no.png"),
        ("inpaint no.png no.png p -o p.png --model TINY", "no.png"),
        ("serve --model nowhere", "nowhere"),
        ("serve --model TINY --port 99999", "--port"),
        ("serve --model TINY --replicas 0", "--replicas"),
        ("serve --model TINY --job-store http://store", "--job-store"),
        ("serve --model TINY --job-store redis://127.0.0.1:1/0", "job_store does not answer"),
        ("serve --model TINY --job-store redis://127.0.0.1:6379/zero", "--job-store"),
        ("serve --model TINY --job-store redis://127.0.0.1:99999", "job_store is not a Redis URL"),
        ("serve --model TINY --device cuda:1,cuda:1", "--device"),
        ("serve --model TINY --device cuda:99,cuda:98 --replicas 3", "replicas is 3"),
        ("generate p -o p.png --model TINY --device cuda:0,cuda:1", "only ldm serve"),
        ("serve --model TINY --lora ink=nowhere", "nowhere"),
    ],
)
def test_a_wrong_argument_is_one_line_on_stderr_and_exit_code_2(
    arguments: str, expected: str, tiny: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny) if part == "TINY" else part for part in arguments.split()]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("ldm: ")
    assert expected in stderr
    assert stderr.count("\n") == 1


def test_only_commands_without_a_prompt_take_several_models():
    assert parser().parse_args(["serve", "--model", "a", "b"]).model == ["a", "b"]
    args = parser().parse_args(["generate", "--model", "a", "a prompt", "-o", "f.png"])
    assert (args.model, args.prompt) == ("a", "a prompt")


def test_a_boolean_setting_is_a_flag_without_a_value(monkeypatch):
    assert settings_of(parser().parse_args(["serve", "--invariant"]), "invariant").invariant
    monkeypatch.setenv("LDM_INVARIANT", "true")
    assert settings_of(parser().parse_args(["serve"]), "invariant").invariant
    monkeypatch.setenv("LDM_INVARIANT", "0")
    assert not settings_of(parser().parse_args(["serve"]), "invariant").invariant


def test_every_setting_has_a_flag_unless_others_must_not_see_it():
    args = vars(parser().parse_args(["serve"]))
    missing = [name for name in SETTINGS if name not in args]
    assert missing == ["api_keys", "faults"]


@pytest.mark.slow
def test_serve_ends_with_code_2_when_a_device_is_missing(tiny, tmp_path):
    command = [sys.executable, "-m", "service.cli", "serve", "--model", str(tiny), "--port", "0"]
    done = subprocess.run(
        [*command, "--device", "cuda:98,cuda:99"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("ldm: device is cuda:9")

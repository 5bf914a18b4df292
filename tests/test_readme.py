"""The examples of three README.md files run as printed, in order, in one folder, against one server.

Blocks that install, serve, build containers or run the tests are not run; every other sh or python block is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.environment import ROOT

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = ("pip install", "ldm serve", "docker ", "pytest")
CURL_SETTINGS = "fail-with-body\nsilent\nshow-error\n"  # an error status fails the example
WRITTEN = re.compile(r"""(?:-o |open\("|save\(["'])([\w.-]+\.png)""")


def examples() -> Iterator[tuple[str, str]]:
    """(language, text) of each block that runs."""
    for file in ("README.md", "models/README.md", "service/README.md"):
        for language, text in BLOCK.findall((ROOT / file).read_text()):
            if not any(word in text for word in NOT_RUN):
                yield language, text


def make_environment(folder: Path) -> dict[str, str]:
    """What a user has after the quick start: .venv/bin/python, .venv/bin/ldm, the weights folder."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, command in (("python", ""), ("ldm", " -m service.cli")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{command} "$@"\n')
        (programs / name).chmod(0o755)
    (folder / "weights").symlink_to(ROOT / "weights")
    (folder / ".curlrc").write_text(CURL_SETTINGS)
    path = f"{programs}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "CURL_HOME": str(folder), "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_every_example_runs(bundled, tmp_path):
    environment, address = make_environment(tmp_path), bundled.client.base_url.netloc.decode()
    languages = []
    for language, text in examples():
        text = text.replace("localhost:8000", address)
        command = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
        before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.png")}
        run = subprocess.run([*command, text], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{text}\n{run.stdout}{run.stderr}"
        for name in WRITTEN.findall(text):
            file = tmp_path / name
            with Image.open(file) as image:
                image.load()
            assert file.stat().st_mtime_ns != before.get(file), f"{name} is not written"
        languages.append(language)
    assert {*languages} == {"sh", "python"}

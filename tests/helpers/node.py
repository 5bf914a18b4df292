"""JavaScript and TypeScript clients: installs their npm packages and runs them with node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests.helpers.environment import ROOT

SOURCES = ROOT / "tests" / "clients"


def install_clients(folder: Path) -> Path:
    """Copy tests/clients into an empty folder and install the packages that its package.json lists."""
    shutil.copytree(SOURCES, folder, dirs_exist_ok=True)
    run(["npm", "install", "--no-audit", "--no-fund", "--prefer-offline"], folder)
    return folder


def run(command: list[str], folder: Path) -> str:
    """Run a command, which must succeed; returns its standard output."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_node(folder: Path, script: str, *arguments: str) -> object:
    """Run a script; returns its output, parsed as JSON."""
    return json.loads(run(["node", script, *arguments], folder))

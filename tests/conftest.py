"""One tiny model, one server on it, for all tests that need them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[1]
READY_SECONDS = 90


@dataclass
class Server:
    """A service in a process of its own."""

    process: subprocess.Popen
    client: httpx.Client

    def rows_per_call(self) -> dict[float, float]:
        """UNet calls so far of at most so many rows."""
        text = self.client.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("ldm_unet_rows_bucket")]
        return {float(line.split('"')[1]): float(line.split()[-1]) for line in lines}

    def worker(self) -> int:
        """The worker's process id."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, called tiny."""
    from tests.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def start_server(tiny: Path) -> Callable[..., object]:
    """start_server(LDM_X=...) as a context: a ready server with these settings."""

    @contextmanager
    def start(**settings: str) -> Iterator[Server]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LDM_DTYPE": "float32"} | settings
        command = [sys.executable, "-m", "service.cli", "serve", "--model", str(tiny), "--port", str(port)]
        process = subprocess.Popen(command, env=environment, cwd=ROOT)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                wait_until(lambda: is_ready(client), READY_SECONDS)
                yield Server(process, client)
        finally:
            process.kill()
            process.wait()

    return start


@pytest.fixture(scope="session")
def server(start_server) -> Iterator[Server]:
    """A server that tests share, and leave as it was."""
    with start_server() as server:
        yield server


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Fail unless it holds within so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)

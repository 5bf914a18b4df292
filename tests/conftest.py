"""One tiny model, one server on it, for all tests that need them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import pytest

from models.training.scenes import FONT

ROOT = Path(__file__).resolve().parents[1]
needs_font = pytest.mark.skipif(
    not FONT.exists() and not os.environ.get("LDM_TESTS_MUST_NOT_SKIP"),
    reason="fonts-noto-color-emoji is not installed",
)
# Seconds that a busy machine may take for anything that must happen; nothing waits for them to pass.
PATIENCE = 180.0
QUEUE_SIZE = 16


@dataclass
class Server:
    """A service in a process of its own."""

    process: subprocess.Popen
    client: httpx.Client

    def metric(self, name: str) -> float:
        """The value of one line of /metrics, labels included in its name."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.rpartition(" ")[0] == name)

    def calls(self, over: int = 0) -> float:
        """UNet calls so far of more than so many rows."""
        within = self.metric(f'ldm_unet_rows_bucket{{le="{float(over)}"}}') if over else 0
        return self.metric("ldm_unet_rows_count") - within

    def health(self) -> dict:
        return self.client.get("/health").json()

    @property
    def is_ready(self) -> bool:
        try:
            return self.client.get("/health/ready").status_code == 200
        except httpx.TransportError:
            self.check_alive()
            return False

    def check_alive(self) -> None:
        code = self.process.poll()
        assert code is None, f"the server has ended with exit code {code}"

    def worker(self) -> int | None:
        """The worker's process id; None between two."""
        self.check_alive()
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None

    def signal_worker(self, number: signal.Signals) -> int:
        """Send a signal to the worker; returns the process id."""
        wait_until(lambda: self.worker() is not None)
        pid = self.worker()
        os.kill(pid, number)
        return pid

    def kill_worker(self) -> None:
        """kill -9, and wait until it is gone; the next may have begun to start."""
        killed = self.signal_worker(signal.SIGKILL)
        wait_until(lambda: self.worker() != killed)

    @contextmanager
    def asked(self, body: dict) -> Iterator[socket.socket]:
        """A client that asks for pictures and leaves, at the latest with the context."""
        content = json.dumps(body)
        request = (
            "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n{content}"
        )
        url = self.client.base_url
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(request.encode())
            yield connection


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, called tiny."""
    from tests.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def start_server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """start_server(model, ..., LDM_X=...) as a context: a ready server of models, tiny if there are none.

    It is started where folders called like our packages lie, none of which it may import.
    """
    trap = tmp_path_factory.mktemp("trap")
    set_trap(trap)

    @contextmanager
    def start(*models: Path, stderr: IO[str] | None = None, **settings: str) -> Iterator[Server]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        defaults = {"OMP_NUM_THREADS": "1", "LDM_DTYPE": "float32", "LDM_QUEUE_SIZE": str(QUEUE_SIZE)}
        defaults["LDM_MAX_BODY_BYTES"] = str(2**20)
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | defaults | settings
        serve = [sys.executable, "-P", "-m", "service.cli", "serve"]
        command = [*serve, "--model", *(models or (tiny,)), "--port", str(port)]
        process = subprocess.Popen(command, env=environment, cwd=trap, stderr=stderr)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
                server = Server(process, client)
                wait_until(lambda: server.is_ready)
                yield server
        finally:
            process.kill()
            process.wait()

    return start


@pytest.fixture(scope="session")
def living(start_server) -> Iterator[Callable[[], Server]]:
    """Gives the server that tests share; another one after a test in which it ended."""
    with ExitStack() as stack:
        servers = []

        def give() -> Server:
            if servers and (code := servers[-1].process.poll()) is not None:
                warnings.warn(f"the server that tests share has ended with exit code {code}", stacklevel=1)
            if not servers or servers[-1].process.poll() is not None:
                servers.append(stack.enter_context(start_server()))
            return servers[-1]

        yield give


@pytest.fixture(scope="session")
def box(start_server) -> Iterator[Server]:
    """A server of the models in the box."""
    with start_server(Path("emoji"), Path("emoji-upscale")) as server:
        yield server


@pytest.fixture
def server(living) -> Iterator[Server]:
    """A server that tests share, and leave as it was."""
    server = living()
    yield server
    server.check_alive()


def set_trap(folder: Path) -> None:
    """Packages that break whoever imports them, called like ours."""
    for name in ("models", "service", "weights"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(
            "raise RuntimeError('imported from the current directory')"
        )


def wait_until(holds: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Fail unless it holds within so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)

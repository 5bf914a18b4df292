"""A server process with a client, and waiting for conditions."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.environment import ROOT

MAX_WAIT_SECONDS = 180.0  # for any condition, on a busy machine; tests never sleep this long
QUEUE_SIZE = 16
DEFAULTS = {  # settings of every server
    "LDM_DTYPE": "float32",
    "LDM_QUEUE_SIZE": str(QUEUE_SIZE),
    "LDM_MAX_BODY_BYTES": str(2**20),
}


@dataclass
class Server:
    """A server process and a client of it."""

    process: subprocess.Popen
    client: httpx.Client

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric with these labels. Raises LookupError if there is none."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        values = [sample.value for sample in samples if labels.items() <= sample.labels.items()]
        if not values:
            raise LookupError(f"there is no sample of {name} with {labels}")
        return sum(values)

    def calls(self, over: int = 0) -> float:
        """The number of UNet calls so far; over: only calls with more rows than this."""
        within = self.metric("ldm_unet_rows_bucket", le=str(float(over))) if over else 0
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
        """The first worker's process id; None while there is no worker."""
        return next(iter(self.workers()), None)

    def workers(self) -> list[int]:
        """The process ids of all workers."""
        self.check_alive()
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def signal_worker(self, number: signal.Signals) -> int:
        """Send a signal to the worker; returns the process id."""
        wait_until(lambda: self.worker() is not None)
        pid = self.worker()
        os.kill(pid, number)
        return pid

    def kill_worker(self) -> None:
        """SIGKILL the worker and wait until it is gone; its successor may be starting."""
        killed = self.signal_worker(signal.SIGKILL)
        wait_until(lambda: self.worker() != killed)

    @contextmanager
    def open_request(self, body: dict) -> Iterator[socket.socket]:
        """A connection that has sent a request; it is closed when the context ends."""
        content = json.dumps(body)
        url = self.client.base_url
        request = (
            f"POST {url.path}generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n{content}"
        )
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(request.encode())
            yield connection


def write_import_trap(folder: Path) -> None:
    """Write packages with the names of our packages that raise an error on import."""
    for name in ("models", "service", "weights"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(
            "raise RuntimeError('imported from the current directory')"
        )


def wait_until(holds: Callable[[], bool], seconds: float = MAX_WAIT_SECONDS) -> None:
    """Wait until a condition is true; fail after this many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"condition not met within {seconds} s"
        time.sleep(0.02)


@contextmanager
def serve(
    models: Sequence[Path | str], folder: Path, stderr: IO[str] | int | None, settings: Mapping[str, str]
) -> Iterator[Server]:
    """Start a server of these models in a folder and wait until it is ready; kill it at the end.

    Without models, the settings say where they are.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    defaults = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | DEFAULTS
    command = [sys.executable, "-P", "-m", "service.cli", "serve", "--port", str(port)]
    command += ["--model", *models] if models else []
    environment = os.environ | defaults | settings
    process = subprocess.Popen(command, env=environment, cwd=folder, stderr=stderr)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=MAX_WAIT_SECONDS) as client:
            server = Server(process, client)
            wait_until(lambda: server.is_ready)
            yield server
    finally:
        process.kill()
        process.wait()

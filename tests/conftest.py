"""One tiny model, one server on it, for all tests that need them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import httpx
import pytest

from tests.helpers.environment import ROOT
from tests.helpers.servers import PATIENCE, QUEUE_SIZE, Server, set_trap, wait_until


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, called tiny."""
    from tests.checkpoints.tiny import write_tiny_model

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

"""Fixtures that many test files share, worker groups, and the `server` and `fast` markers.

Helpers that are not fixtures are in tests/helpers, builders of test models in tests/checkpoints. See
tests/README.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: pytest-xdist uses the cores

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.node import install_clients
from tests.helpers.servers import Server, serve, write_import_trap

# Worker groups in the order in which they start; all others follow. Most groups are one file.
SLOWEST_FIRST = ("shared_server", "test_faults_over_http.py", "bundled", "test_cli.py", "families")
SHARED = ("shared_server", "bundled", "families")  # server fixtures: all tests that use one are one group


# A busy machine makes an example slow, which says nothing about the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model `tiny`, with random weights."""
    from tests.checkpoints.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def start_server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """start_server(model, ..., LDM_X=...): a context manager that gives a ready server; default model: tiny,
    unless a setting names a folder of models.

    The server's current directory holds packages named models, service and weights; importing one of them
    fails the server.
    """
    trap = tmp_path_factory.mktemp("trap")
    write_import_trap(trap)

    def start(*models: Path | str, stderr: object = None, **settings: str) -> object:
        without_models = "LDM_MODEL_DIR" in settings
        return serve(models or (() if without_models else (tiny,)), trap, stderr, settings)

    return start


@pytest.fixture(scope="session")
def shared_server(start_server) -> Iterator[Callable[[], Server]]:
    """A function that returns the shared server of `tiny`, or a new one if that has ended."""
    with ExitStack() as stack:
        servers: list[Server] = []

        def running() -> Server:
            if servers and (code := servers[-1].process.poll()) is not None:
                warnings.warn(f"the shared server has ended with exit code {code}", stacklevel=1)
            if not servers or servers[-1].process.poll() is not None:
                servers.append(stack.enter_context(start_server()))
            return servers[-1]

        yield running


@pytest.fixture(scope="session")
def bundled(start_server) -> Iterator[Server]:
    """A server of the bundled models."""
    settings = {
        "LDM_DTYPE": "auto",
        "LDM_ALIAS": "my-images=emoji",
        "LDM_CORS_ORIGINS": "https://page.example",
    }
    with start_server("emoji", "emoji-upscale", **settings) as server:
        yield server


@pytest.fixture
def server(shared_server) -> Iterator[Server]:
    """The shared server of `tiny`. Every test leaves it idle."""
    server = shared_server()
    yield server
    server.check_alive()


@pytest.fixture(scope="session")
def node_clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of tests/clients with its npm packages; skipped without npm, unless tests must not skip."""
    if not shutil.which("npm") and not os.environ.get("LDM_TESTS_MUST_NOT_SKIP"):
        pytest.skip("npm is not installed")
    return install_clients(tmp_path_factory.mktemp("clients"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test as server or fast, and give tests that share a server or a file one worker."""
    for item in items:
        if "start_server" in item.fixturenames:
            item.add_marker("server")
        elif not item.get_closest_marker("slow"):
            item.add_marker("fast")
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=rank)


def group_of(item: pytest.Item) -> str:
    """The name of the worker group of a test."""
    return next((name for name in SHARED if name in item.fixturenames), item.path.name)


def rank(item: pytest.Item) -> tuple[int, bool]:
    """The slowest groups first, then other tests with a server, then the rest."""
    group = group_of(item)
    place = SLOWEST_FIRST.index(group) if group in SLOWEST_FIRST else len(SLOWEST_FIRST)
    return place, item.get_closest_marker("server") is None

"""Fixtures that many test files share, worker groups, and the `server` and `fast` markers.

Helpers that are not fixtures are in tests/helpers, builders of test models in tests/checkpoints. See
tests/README.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: pytest-xdist uses the cores
# Servers and commands run by torch, as without the optional package openvino, unless a test says otherwise.
os.environ.setdefault("LDM_BACKEND", "torch")

import importlib
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.node import install_clients
from tests.helpers.servers import QUEUE_SIZE, Server, serve, write_import_trap

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

RAY_FILE = "test_ray.py"
RAY = "Ray"  # the second place where tests with the marker `everywhere` run, and their worker group

# Worker groups in the order in which they start; all others follow. Most groups are one file.
SLOWEST_FIRST = ("shared_server", RAY, "test_faults_over_http.py", "bundled", "test_cli.py", "families")
SHARED = ("shared_server", "bundled", "families")  # server fixtures: all tests that use one are one group


# Settings of the servers of the bundled models.
BUNDLED_SETTINGS = {
    "LDM_DTYPE": "auto",
    "LDM_ALIAS": "my-images=emoji",
    "LDM_CORS_ORIGINS": "https://page.example",
    "LDM_LORA": "few-steps=emoji-few-steps",
}

# A busy machine makes an example slow, which says nothing about the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package openvino counts as not installed in this process; see the fixture with_openvino."""
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.fixture
def with_openvino(without_openvino: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package openvino is importable."""
    monkeypatch.delitem(sys.modules, "openvino")
    monkeypatch.setitem(sys.modules, "openvino", importlib.import_module("openvino"))


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
def bundled_server(start_server) -> Iterator[Callable[[], Server]]:
    """A function that returns `ldm serve` with the bundled models, started at its first call."""
    with ExitStack() as stack:
        yield cache(lambda: stack.enter_context(start_server("emoji", "emoji-upscale", **BUNDLED_SETTINGS)))


@pytest.fixture(scope="session")
def ray_servers(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], dict[str, Server]]]:
    """A function that returns the Ray applications of one cluster, started at its first call.

    `server` serves tiny; so does `pair`, with two API replicas, which start the engine replica; `bundled`
    serves the bundled models.
    """
    from tests.helpers.ray_clusters import RayApplication, ray_cluster, servers_of
    from tests.helpers.redis_servers import redis_server

    with ExitStack() as stack:

        @cache
        def running() -> dict[str, Server]:
            redis = stack.enter_context(redis_server(tmp_path_factory.mktemp("redis")))
            arguments, served = {"jobs_per_engine": QUEUE_SIZE}, {"LDM_MODEL": str(tiny)}
            models = {"LDM_MODEL": "emoji,emoji-upscale", **BUNDLED_SETTINGS}
            pair = arguments | {"api_replicas": 2, "min_engines": 0}
            applications = [
                RayApplication("bundled", "", models, arguments),
                RayApplication("server", "/tiny", served, arguments),
                RayApplication("pair", "/pair", {**served, "LDM_JOB_STORE": redis.url}, pair),
            ]
            cluster = stack.enter_context(ray_cluster(applications))
            servers = stack.enter_context(servers_of(cluster, applications))
            return {each.name: server for each, server in zip(applications, servers, strict=True)}

        yield running


@pytest.fixture(scope="session")
def bundled(request: pytest.FixtureRequest, bundled_server, ray_servers) -> Server:
    """A server of the bundled models."""
    return ray_servers()["bundled"] if is_ray(request) else bundled_server()


@pytest.fixture
def server(request: pytest.FixtureRequest, shared_server, ray_servers) -> Iterator[Server]:
    """The shared server of `tiny`. Every test leaves it idle."""
    server = ray_servers()["server"] if is_ray(request) else shared_server()
    yield server
    server.check_alive()


def is_ray(request: pytest.FixtureRequest) -> bool:
    """Whether a test with the marker `everywhere` runs with the Ray application."""
    return getattr(request, "param", None) == RAY


@pytest.fixture(scope="session")
def node_clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of tests/clients with its npm packages; skipped without npm, unless tests must not skip."""
    if not shutil.which("npm") and not os.environ.get("LDM_TESTS_MUST_NOT_SKIP"):
        pytest.skip("npm is not installed")
    return install_clients(tmp_path_factory.mktemp("clients"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests with the marker `everywhere` with `ldm serve` and with the Ray application."""
    if metafunc.definition.get_closest_marker("everywhere"):
        places = ["ldm serve", RAY] if wants_ray(metafunc.config) else ["ldm serve"]
        for name in {"server", "bundled"} & {*metafunc.fixturenames}:
            scope = "session" if name == "bundled" else "function"
            metafunc.parametrize(name, places, indirect=True, scope=scope)


def wants_ray(config: pytest.Config) -> bool:
    """Whether tests run with the Ray application too: if LDM_TESTS_RAY is set, or -k names Ray.

    A cluster takes half a minute to start, and takes processor time from all other tests as long as it runs.
    """
    return "LDM_TESTS_RAY" in os.environ or RAY in config.getoption("keyword")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test as server or fast, and give tests that share a server or a file one worker."""
    if not wants_ray(config):
        items[:] = [item for item in items if group_of(item) != RAY]
    for item in items:
        if "start_server" in item.fixturenames:
            item.add_marker("server")
        elif not item.get_closest_marker("slow"):
            item.add_marker("fast")
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=rank)


def group_of(item: pytest.Item) -> str:
    """The name of the worker group of a test."""
    if item.path.name == RAY_FILE or (hasattr(item, "callspec") and RAY in item.callspec.params.values()):
        return RAY
    return next((name for name in SHARED if name in item.fixturenames), item.path.name)


def rank(item: pytest.Item) -> tuple[int, bool]:
    """The slowest groups first, then other tests with a server, then the rest."""
    group = group_of(item)
    place = SLOWEST_FIRST.index(group) if group in SLOWEST_FIRST else len(SLOWEST_FIRST)
    return place, item.get_closest_marker("server") is None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController, error: object) -> None:
    """Print how a worker of pytest-xdist ended that died in a test."""
    if error:
        with suppress(subprocess.TimeoutExpired):
            ended = node.gateway._io.popen.wait(timeout=10)
            print(f"\nworker {node.gateway.id}: exit code {ended} (negative: signal)", flush=True)

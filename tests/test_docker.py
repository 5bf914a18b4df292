"""The image and what stands beside it, as far as can be seen without building; docker/check.sh builds it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from service.api import health
from service.cli.serve import GRACE_SECONDS
from service.metrics import Metrics
from service.settings import Settings, read_settings

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


class ComposeLoader(yaml.SafeLoader):
    """Knows Compose's own tag for what an override takes away."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's (word, rest), continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", "").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def last(word: str) -> str:
    """What the image ends up with."""
    return [rest for name, rest in instructions() if name == word][-1]


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    return yaml.load((DOCKER / name).read_text(), ComposeLoader)


def is_content(line: str) -> bool:
    return bool(line) and not line.startswith("#")


def sent(path: str) -> bool:
    """Whether a file of the repository goes into the build: the last pattern that matches decides."""
    parts = path.split("/")
    above = ["/".join(parts[:i]) for i in range(1, len(parts) + 1)]
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        anywhere = [*above, *parts] if pattern.startswith("**/") else above
        if (
            line
            and not line.startswith("#")
            and any(fnmatch(a, pattern.removeprefix("**/")) for a in anywhere)
        ):
            ignored = not line.startswith("!")
    return not ignored


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server that answers /health/ready with a status, and anything else with 404; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def is_healthy(port: int) -> bool:
    """What the image's HEALTHCHECK says."""
    python, *arguments = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert python == "python"
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | {"LDM_PORT": str(port)}, stderr=subprocess.DEVNULL)
    return done.returncode == 0


def test_the_base_is_slim_and_the_default_needs_no_gpu():
    arguments = [rest for word, rest in instructions() if word == "ARG"]
    assert ("FROM", "python:${PYTHON} AS base") in instructions()
    assert any(re.fullmatch(r"PYTHON=3\.1[1-3]-slim-\w+", argument) for argument in arguments)
    assert "VARIANT=cpu" in arguments


def test_torch_is_one_that_the_package_takes():
    version = next(rest for word, rest in instructions() if rest.startswith("TORCH=")).partition("=")[2]
    assert next(r for r in requirements() if r.name == "torch").specifier.contains(version)


def test_signals_reach_the_service_itself():
    assert json.loads(last("ENTRYPOINT")) == ["ldm"]
    assert json.loads(last("CMD")) == ["serve"]


def test_the_user_is_not_root_and_a_number():
    assert int(last("USER").partition(":")[0]) > 0


def test_only_the_cuda_variant_has_a_compiler():
    runs = [rest for word, rest in instructions() if word == "RUN" and "gcc" in rest]
    assert len(runs) == 1
    assert re.search(r"cpu\) ;;\s+cuda\) apt-get update .*gcc libc6-dev", runs[0])


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_asks_whether_the_service_is_ready(status: int, healthy: bool):
    assert "/health/ready" in [route.path for route in health.router.routes]
    with answering(status) as port:
        assert is_healthy(port) is healthy


def test_the_health_check_fails_where_nobody_listens():
    with answering(200) as port:
        pass
    assert not is_healthy(port)


@pytest.mark.parametrize(
    "path",
    [
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "models/networks/unet.py",
        "service/cli/main.py",
        "weights/emoji/ldm.json",
    ],
)
def test_what_the_image_is_made_of_is_sent(path: str):
    assert (ROOT / path).is_file()
    assert sent(path)


@pytest.mark.parametrize(
    "path",
    [
        "tests/conftest.py", ".git/config", ".ci/run", ".venv/bin/python", "Dockerfile",
        "docker/compose.yaml", "service/__pycache__/cli.pyc", "weights/emoji/sheets/inpainting.png",
        "my.ckpt",
    ],
)  # fmt: skip
def test_the_rest_is_not(path: str):
    assert not sent(path)


def requirements() -> list[Requirement]:
    return list(
        map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    )


def test_the_pinned_versions_are_those_that_the_package_takes():
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(r.name): r.specifier for r in map(Requirement, filter(is_content, lines))}
    assert "torch" not in pinned  # an argument of the build
    assert "fastapi" in pinned
    for requirement in requirements():
        for version in pinned.get(canonicalize_name(requirement.name), ()):
            assert requirement.specifier.contains(version.version), requirement


def test_the_variables_are_settings():
    words = re.findall(r"(LDM_\w+)=(\S+)", last("ENV"))
    environment = dict(words) | {
        "LDM_DRAIN_SECONDS": compose()["services"]["ldm"]["environment"]["LDM_DRAIN_SECONDS"]
    }
    settings = read_settings(environment)
    assert (settings.host, settings.port) == ("0.0.0.0", int(last("EXPOSE")))
    assert all(hasattr(Settings, name[4:].lower()) for name in compose()["services"]["ldm"]["environment"])


def test_compose_reserves_a_gpu_and_builds_for_it():
    ldm = compose()["services"]["ldm"]
    assert ldm["build"]["args"]["VARIANT"] == "cuda"
    assert ldm["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_compose_without_a_gpu_takes_both_away():
    ldm = compose("compose.cpu.yaml")["services"]["ldm"]
    assert ldm["build"]["args"]["VARIANT"] == "cpu"
    assert ldm["deploy"] is None


def test_compose_waits_for_the_drain():
    ldm = compose()["services"]["ldm"]
    grace = int(ldm["stop_grace_period"].removesuffix("s"))
    assert grace >= float(ldm["environment"]["LDM_DRAIN_SECONDS"]) + GRACE_SECONDS


def test_compose_names_files_and_volumes_that_are_there():
    whole = compose()
    for service in whole["services"].values():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume).partition(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in whole["volumes"], (
                volume
            )


def test_prometheus_asks_the_service():
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": [f"ldm:{last('EXPOSE')}"]}]
    assert "/metrics" in [route.path for route in health.router.routes]


def names_of(family: Metric) -> set[str]:
    """As Prometheus stores them."""
    return {family.name + suffix for suffix in SUFFIXES[family.type]}


def test_the_dashboard_names_only_metrics_that_there_are():
    known = set().union(*map(names_of, Metrics().registry.collect()))
    panels = json.loads((DOCKER / "grafana/dashboards/ldm.json").read_text())["panels"]
    named = [set(re.findall(r"ldm_\w+", t["expr"])) for panel in panels for t in panel["targets"]]
    assert all(named)  # each asks for something of ours
    assert set().union(*named) <= known


def test_the_dashboard_names_only_labels_that_there_are():
    metrics = [m for m in vars(Metrics()).values() if isinstance(m, MetricWrapperBase)]
    known = {"le"}.union(*(m._labelnames for m in metrics))
    text = (DOCKER / "grafana/dashboards/ldm.json").read_text()
    grouped = [name.strip() for names in re.findall(r"by \(([^)]+)\)", text) for name in names.split(",")]
    named = {*grouped, *re.findall(r"\{(\w+)=", text), *re.findall(r"\{\{(\w+)\}\}", text)}
    assert {"le", "part", "status"} <= named <= known


def test_the_dashboard_asks_the_source_that_is_provided():
    source = yaml.safe_load((DOCKER / "grafana/datasources/prometheus.yaml").read_text())["datasources"][0]
    panels = json.loads((DOCKER / "grafana/dashboards/ldm.json").read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert "prometheus" in compose()["services"]
    assert source["url"] == "http://prometheus:9090"

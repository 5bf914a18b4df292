"""Dockerfile, Compose files and dashboard, checked without a build; docker/check.sh builds the image."""

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
    """Knows the tag !reset, by which an override file removes a value."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's (instruction, arguments), with continued lines joined and without comments."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", "").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word]


def last(word: str) -> str:
    """The arguments of the last such instruction, which is the one that counts."""
    return [rest for name, rest in instructions() if name == word][-1]


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    return yaml.load((DOCKER / name).read_text(), ComposeLoader)


def is_content(line: str) -> bool:
    return bool(line) and not line.startswith("#")


@contextmanager
def answering(status: int) -> Iterator[int]:
    """The port of a server that answers /health/ready with a status, and other paths with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def is_healthy(port: int) -> bool:
    """The result of the image's HEALTHCHECK."""
    python, *arguments = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    assert python == "python"
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | {"LDM_PORT": str(port)}, stderr=subprocess.DEVNULL)
    return done.returncode == 0


def test_the_torch_version_satisfies_the_packages_requirement():
    version = next(rest for word, rest in instructions() if rest.startswith("TORCH=")).partition("=")[2]
    assert next(r for r in requirements() if r.name == "torch").specifier.contains(version)


def test_the_service_is_the_process_that_gets_signals():
    assert json.loads(last("ENTRYPOINT")) == ["ldm"]
    assert json.loads(last("CMD")) == ["serve"]


def test_the_user_is_numeric_and_not_root():
    assert int(last("USER").partition(":")[0]) > 0


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_follows_readiness(status: int, healthy: bool):
    assert "/health/ready" in [route.path for route in health.router.routes]
    with answering(status) as port:
        assert is_healthy(port) is healthy


def test_the_health_check_fails_without_a_server():
    with answering(200) as port:
        pass
    assert not is_healthy(port)


def test_the_build_context_is_an_allow_list_of_paths_that_exist():
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if is_content(line)]
    allowed = [line.removeprefix("!") for line in patterns if line.startswith("!")]
    assert patterns[0] == "*"
    assert {"pyproject.toml", "models", "service", "weights", "LICENSE"} <= set(allowed)
    assert not {"tests", ".git", ".ci", "Dockerfile"} & set(allowed)
    assert all((ROOT / path).exists() for path in allowed)


def requirements() -> list[Requirement]:
    return list(
        map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    )


def test_pinned_versions_satisfy_the_packages_requirements():
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(r.name): r.specifier for r in map(Requirement, filter(is_content, lines))}
    assert "torch" not in pinned  # a build argument
    assert "fastapi" in pinned
    for requirement in requirements():
        for version in pinned.get(canonicalize_name(requirement.name), ()):
            assert requirement.specifier.contains(version.version), requirement


def test_environment_variables_are_settings():
    words = re.findall(r"(LDM_\w+)=(\S+)", last("ENV"))
    environment = dict(words) | {
        "LDM_DRAIN_SECONDS": compose()["services"]["ldm"]["environment"]["LDM_DRAIN_SECONDS"]
    }
    settings = read_settings(environment)
    assert (settings.host, settings.port) == ("0.0.0.0", int(last("EXPOSE")))
    assert all(hasattr(Settings, name[4:].lower()) for name in compose()["services"]["ldm"]["environment"])


def test_compose_uses_a_gpu_and_the_override_takes_it_away():
    ldm, override = compose()["services"]["ldm"], compose("compose.cpu.yaml")["services"]["ldm"]
    assert ldm["build"]["args"]["VARIANT"] == "cuda"
    assert ldm["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert override["build"]["args"]["VARIANT"] == "cpu"
    assert override["deploy"] is None


def test_two_servers_share_a_redis_behind_one_port():
    services = compose("compose.two.yaml")["services"]
    assert services["ldm"]["scale"] == 2
    assert not services["ldm"]["ports"]
    assert services["ldm"]["environment"]["LDM_JOB_STORE"] == "redis://redis:6379/0"
    assert services["proxy"]["ports"] == compose()["services"]["ldm"]["ports"]
    source = services["proxy"]["volumes"][0].partition(":")[0]
    assert f"server ldm:{last('EXPOSE')} " in (DOCKER / source).read_text()


def test_compose_waits_longer_than_the_drain():
    ldm = compose()["services"]["ldm"]
    grace = int(ldm["stop_grace_period"].removesuffix("s"))
    assert grace >= float(ldm["environment"]["LDM_DRAIN_SECONDS"]) + GRACE_SECONDS


def test_compose_mounts_files_and_volumes_that_exist():
    whole = compose()
    for service in whole["services"].values():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume).partition(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in whole["volumes"], (
                volume
            )


def test_prometheus_scrapes_the_service():
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    servers = {"names": ["ldm"], "type": "A", "port": int(last("EXPOSE"))}
    assert config["scrape_configs"][0]["dns_sd_configs"] == [servers]
    assert "/metrics" in [route.path for route in health.router.routes]


def names_of(family: Metric) -> set[str]:
    """The names of its series."""
    return {family.name + suffix for suffix in SUFFIXES[family.type]}


def test_the_dashboard_queries_existing_metrics_and_labels():
    known = set().union(*map(names_of, Metrics().registry.collect()))
    panels = json.loads((DOCKER / "grafana/dashboards/ldm.json").read_text())["panels"]
    named = [set(re.findall(r"ldm_\w+", t["expr"])) for panel in panels for t in panel["targets"]]
    assert all(named)
    assert set().union(*named) <= known
    metrics = [m for m in vars(Metrics()).values() if isinstance(m, MetricWrapperBase)]
    labels = {"le"}.union(*(m._labelnames for m in metrics))
    text = (DOCKER / "grafana/dashboards/ldm.json").read_text()
    grouped = [name.strip() for names in re.findall(r"by \(([^)]+)\)", text) for name in names.split(",")]
    used = {*grouped, *re.findall(r"\{(\w+)=", text), *re.findall(r"\{\{(\w+)\}\}", text)}
    assert {"le", "part", "status"} <= used <= labels


def test_the_dashboard_uses_the_provisioned_data_source():
    source = yaml.safe_load((DOCKER / "grafana/datasources/prometheus.yaml").read_text())["datasources"][0]
    panels = json.loads((DOCKER / "grafana/dashboards/ldm.json").read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert "prometheus" in compose()["services"]
    assert source["url"] == "http://prometheus:9090"

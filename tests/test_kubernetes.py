"""The manifests in docker/kubernetes: valid by Kubernetes' own schemas, and in step with the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.api import health
from service.cli.serve import FETCH_SECONDS, GRACE_SECONDS, LINGER_SECONDS
from service.metrics import Metrics
from service.settings import Settings, read_settings

FOLDER = Path(__file__).resolve().parents[1] / "docker/kubernetes"
VERSIONS = ("1.30", "1.37")


def manifests() -> list[dict[str, Any]]:
    files = sorted(FOLDER.glob("*.yaml"))
    return [manifest for file in files for manifest in yaml.safe_load_all(file.read_text())]


def manifest(kind: str, name: str = "ldm") -> dict[str, Any]:
    (found,) = [m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def pod(name: str = "ldm") -> dict[str, Any]:
    return manifest("Deployment", name)["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return only


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid(version):
    for one in manifests():
        kubernetes_validate.validate(one, version, strict=True)


def test_a_misspelled_field_is_found():
    wrong = manifest("Deployment")
    wrong["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_environment_variables_are_settings():
    environment = {entry["name"]: entry["value"] for entry in container()["env"]}
    read_settings(environment)
    assert all(hasattr(Settings, name[4:].lower()) for name in environment)


def test_the_pod_has_time_to_drain():
    environment = {entry["name"]: entry["value"] for entry in container()["env"]}
    _, pause = container()["lifecycle"]["preStop"]["exec"]["command"]
    drain = float(environment["LDM_DRAIN_SECONDS"]) + FETCH_SECONDS + LINGER_SECONDS + GRACE_SECONDS
    assert pod()["terminationGracePeriodSeconds"] >= float(pause) + drain


def test_probes_ask_routes_that_exist():
    routes = {route.path for route in health.router.routes}
    probes = [container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert {probe["path"] for probe in probes} <= routes
    ports = {port["name"] for port in container()["ports"]}
    assert {probe["port"] for probe in probes} <= ports
    assert manifest("Service")["spec"]["ports"][0]["targetPort"] in ports


def test_a_server_has_a_gpu_and_no_rights():
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == 1
    for name in ("ldm", "ldm-redis"):
        assert pod(name)["securityContext"]["runAsNonRoot"]
        (only,) = pod(name)["containers"]
        assert only["securityContext"]["readOnlyRootFilesystem"]
        assert only["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("kind", ["Service", "PodDisruptionBudget"])
def test_selectors_select_the_pods(kind):
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    selector = manifest(kind)["spec"]["selector"]
    assert (selector.get("matchLabels") or selector).items() <= labels.items()


def test_the_autoscaler_follows_a_metric_of_the_service():
    spec = manifest("HorizontalPodAutoscaler")["spec"]
    assert spec["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    names = {family.name for family in Metrics().registry.collect()}
    assert {metric["pods"]["metric"]["name"] for metric in spec["metrics"]} <= names


def test_the_job_store_is_the_redis_of_the_manifests():
    environment = {entry["name"]: entry["value"] for entry in container()["env"]}
    service = manifest("Service", "ldm-redis")
    port = service["spec"]["ports"][0]["port"]
    assert environment["LDM_JOB_STORE"] == f"redis://{service['metadata']['name']}:{port}/0"

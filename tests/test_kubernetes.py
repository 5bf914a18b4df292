"""The manifests in docker/kubernetes: valid by Kubernetes' own schemas, and in step with the service."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from service.api import health
from service.cli.serve import FETCH_SECONDS, GRACE_SECONDS, LINGER_SECONDS
from service.cluster.application import END_MARGIN_SECONDS, check, parse
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


def ray_pods() -> dict[str, dict[str, Any]]:
    """Group name -> pod spec of the Ray cluster."""
    cluster = manifest("RayService", "ldm-ray")["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"]}
    groups |= {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def ray_application() -> dict[str, Any]:
    config = yaml.safe_load(manifest("RayService", "ldm-ray")["spec"]["serveConfigV2"])
    (only,) = ServeDeploySchema.model_validate(config).model_dump()["applications"]
    return only


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid(version):
    for one in manifests():
        if one["kind"] != "RayService":  # whose schema belongs to KubeRay
            kubernetes_validate.validate(one, version, strict=True)
    for name, spec in ray_pods().items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        kubernetes_validate.validate(pod, version, strict=True)


def test_ray_serves_the_application_with_arguments_and_settings_that_exist():
    application = ray_application()
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(import_module(module), name))
    shape, variables = parse(application["args"]), application["runtime_env"]["env_vars"]
    check(shape, read_settings(variables))
    assert all(hasattr(Settings, variable[4:].lower()) for variable in variables)
    groups = manifest("RayService", "ldm-ray")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    most = {group["groupName"]: group["maxReplicas"] for group in groups}
    assert (most["api"], most["gpu"]) == (shape.api_replicas, shape.max_engines)


def test_ray_s_nodes_have_time_to_drain_and_no_rights():
    seconds = float(ray_application()["runtime_env"]["env_vars"]["LDM_DRAIN_SECONDS"])
    for name, spec in ray_pods().items():
        assert name == "head" or spec["terminationGracePeriodSeconds"] >= seconds + END_MARGIN_SECONDS
        assert spec["securityContext"]["runAsNonRoot"]
        (only,) = spec["containers"]
        assert only["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in only["env"]
        assert ("nvidia.com/gpu" in only["resources"]["limits"]) == (name == "gpu")


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

"""The Ray application's arguments and settings, and what is refused before anything starts."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from service.cluster import ray_version
from service.cluster.application import Arguments, build, check, gpus, parse
from service.settings import SettingError, Settings
from tests.helpers.environment import ROOT

STORE = "redis://localhost:6379/0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"max_engine": "2"},
            "max_engine is not an argument; expected one of api_replicas, min_engines, max_engines",
        ),
        ({"api_replicas": "0"}, "api_replicas is '0': Input should be greater than or equal to 1"),
        ({"min_engines": "many"}, "min_engines is 'many': Input should be a valid integer"),
        ({"gpus_per_engine": 2}, "gpus_per_engine is 2: Input should be less than or equal to 1"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(SettingError) as error:
        parse(arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({"api_replicas": 2}, {}, "api_replicas is 2, but job_store is not set"),
        ({}, {"replicas": "2"}, "an engine replica has one worker"),
        ({}, {"device": "cuda:0,cuda:1"}, "an engine replica has one worker"),
        ({"min_engines": 2}, {}, "min_engines is 2, but max_engines is 1"),
    ],
)
def test_what_cannot_hold_in_a_cluster_is_refused(arguments, settings, message):
    with pytest.raises(SettingError) as error:
        check(parse(arguments), Settings(**settings))
    assert str(error.value).startswith(message)


def test_several_api_replicas_with_a_job_store_are_accepted():
    check(parse({"api_replicas": 2}), Settings(job_store=STORE))


@pytest.mark.parametrize(("device", "expected"), [("cpu", 0.0), ("cuda", 1.0)])
def test_engine_replicas_have_a_gpu_unless_the_device_is_the_cpu(device, expected):
    assert gpus(Arguments(), Settings(device=device)) == expected
    assert gpus(Arguments(gpus_per_engine=0.5), Settings(device=device)) == 0.5


def test_the_application_has_autoscaled_engine_replicas_and_api_replicas_without_a_gpu(monkeypatch):
    monkeypatch.setenv("LDM_DEVICE", "cuda")
    api = build({"min_engines": "0", "max_engines": "4", "jobs_per_engine": "6"})._bound_deployment
    engines = api.init_args[1]._bound_deployment
    assert (api.name, api.num_replicas, api.ray_actor_options["num_gpus"]) == ("Api", 1, 0)
    assert (engines.name, engines.ray_actor_options["num_gpus"]) == ("Engine", 1.0)
    scaling = engines._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (0, 4, 6)


@pytest.mark.parametrize("found", ["2.9.3", "2.55.1", None])
def test_a_version_of_ray_that_is_too_old_or_missing_is_refused_in_one_sentence(monkeypatch, found):
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(ray_version, "version", version)
    with pytest.raises(SettingError) as error:
        ray_version.check_ray()
    end = f"the installed version is {found}" if found else "Ray is not installed"
    assert str(error.value) == (f"the cluster needs Ray Serve 2.56 or later: pip install '.[cluster]'; {end}")


def test_the_job_store_does_not_load_ray():
    code = "import service.cluster, service.api.app, sys; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})

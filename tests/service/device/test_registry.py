"""Which models are loaded if they do not all fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from models.checkpoint.parts import count_parameters
from models.errors import CheckpointError
from service.device.registry import Registry
from service.engine.job import ModelKey
from service.model_paths import locate_all
from tests.checkpoints.ldm_files import published
from tests.checkpoints.tiny import tiny_model, tiny_spec

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def paths(tiny: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("three")
    return {name: Path(shutil.copytree(tiny, folder / name)) for name in NAMES}


def registry_of(paths: dict[str, Path], memory: int) -> Registry[str]:
    """A registry whose bundles are the names of their models, of 10 bytes each."""
    return Registry(paths, lambda source: source.path.name, lambda spec: 10, memory)


def loaded(registry: Registry) -> list[str]:
    return [name for name in NAMES if registry.is_loaded(name)]


def test_specs_are_read_without_the_weights(paths):
    registry = Registry(paths, lambda source: pytest.fail("loaded"))
    assert [spec.name for spec in registry.specs.values()] == list(NAMES)
    assert registry.specs["a"].unet == tiny_spec().unet


def test_without_a_limit_all_models_are_loaded_at_start_up(paths):
    registry = registry_of(paths, 0)
    registry.load_all()
    assert loaded(registry) == ["a", "b", "c"]


def test_at_start_up_as_many_models_are_loaded_as_fit_but_at_least_one(paths):
    for memory, expected in ((20, ["a", "b"]), (5, ["a"])):
        registry = registry_of(paths, memory)
        registry.load_all()
        assert loaded(registry) == expected


def test_the_least_recently_used_idle_model_makes_room(paths):
    registry = registry_of(paths, 20)
    registry.load_all()
    assert registry["a"] == "a"
    assert registry.load("c")
    assert loaded(registry) == ["a", "c"]
    assert registry.load("b", busy=["a"])
    assert loaded(registry) == ["a", "b"]


def test_nothing_is_loaded_beside_busy_models_that_leave_no_room(paths):
    registry = registry_of(paths, 20)
    registry.load_all()
    assert not registry.load("c", busy=["a", "b"])
    assert loaded(registry) == ["a", "b"]


def test_parameters_are_counted_without_creating_them():
    bundle = tiny_model()
    networks = (bundle.unet, bundle.autoencoder, bundle.conditioner)
    expected = sum(p.numel() for network in networks for p in network.parameters())
    assert count_parameters(bundle.spec) == expected


def test_a_pickle_is_identified_only_if_allowed(tmp_path):
    torch.save({"state_dict": published("celebahq")}, tmp_path / "celeb.ckpt")
    paths = locate_all((str(tmp_path / "celeb.ckpt"),), allow_pickle=True)
    registry = Registry(paths, lambda source: pytest.fail("loaded"), allow_pickle=True)
    assert registry.specs["celeb"].tasks == ("unconditional",)
    with pytest.raises(CheckpointError, match="allow_pickle"):
        Registry(paths, lambda source: pytest.fail("loaded"))


def test_idle_models_are_unloaded_to_make_room(paths):
    registry = registry_of(paths, 0)
    registry.load_all()
    registry.unload_idle([ModelKey("b")])
    assert loaded(registry) == ["b"]

"""Which models are loaded when they do not all fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from models.latent_diffusion import weights_in
from service.registry import Registry
from tests.tiny import tiny_model, tiny_spec

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def paths(tiny: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("three")
    return {name: Path(shutil.copytree(tiny, folder / name)) for name in NAMES}


def registry_of(paths: dict[str, Path], memory: int) -> Registry[str]:
    """Bundles are their names; each takes 10 bytes."""
    return Registry(paths, lambda path: path.name, lambda spec: 10, memory)


def loaded(registry: Registry) -> list[str]:
    return [name for name in NAMES if registry.holds(name)]


def test_what_models_are_is_known_without_their_weights(paths):
    registry = Registry(paths, lambda path: pytest.fail("loaded"))
    assert [spec.name for spec in registry.specs.values()] == list(NAMES)
    assert registry.specs["a"].unet == tiny_spec().unet


def test_without_a_limit_all_are_loaded_at_the_start(paths):
    registry = registry_of(paths, 0)
    registry.load_all()
    assert loaded(registry) == ["a", "b", "c"]


def test_at_the_start_as_many_are_loaded_as_fit_and_one_at_least(paths):
    for memory, expected in ((20, ["a", "b"]), (5, ["a"])):
        registry = registry_of(paths, memory)
        registry.load_all()
        assert loaded(registry) == expected


def test_the_least_recently_used_that_nobody_needs_makes_room(paths):
    registry = registry_of(paths, 20)
    registry.load_all()
    assert registry["a"] == "a"
    assert registry.load("c")
    assert loaded(registry) == ["a", "c"]
    assert registry.load("b", busy=["a"])
    assert loaded(registry) == ["a", "b"]


def test_beside_busy_ones_that_leave_no_room_nothing_is_loaded(paths):
    registry = registry_of(paths, 20)
    registry.load_all()
    assert not registry.load("c", busy=["a", "b"])
    assert loaded(registry) == ["a", "b"]


def test_the_weights_of_a_model_are_counted_without_making_them():
    bundle = tiny_model()
    networks = (bundle.unet, bundle.autoencoder, bundle.conditioner)
    assert weights_in(bundle.spec) == sum(p.numel() for network in networks for p in network.parameters())

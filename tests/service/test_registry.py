"""Which models are loaded when they do not all fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from models.checkpoint.conversion import convert
from models.checkpoint.parts import count_parameters
from models.errors import CheckpointError
from service.device.registry import Registry
from service.engine.job import ModelKey
from service.model_paths import ModelPathError, locate, locate_all
from tests.checkpoints.ldm_files import published, write
from tests.checkpoints.tiny import tiny_model, tiny_spec

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def paths(tiny: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("three")
    return {name: Path(shutil.copytree(tiny, folder / name)) for name in NAMES}


def registry_of(paths: dict[str, Path], memory: int) -> Registry[str]:
    """Bundles are their names; each takes 10 bytes."""
    return Registry(paths, lambda source: source.path.name, lambda spec: 10, memory)


def loaded(registry: Registry) -> list[str]:
    return [name for name in NAMES if registry.holds(name)]


def test_what_models_are_is_known_without_their_weights(paths):
    registry = Registry(paths, lambda source: pytest.fail("loaded"))
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
    expected = sum(p.numel() for network in networks for p in network.parameters())
    assert count_parameters(bundle.spec) == expected


def test_single_files_are_called_by_their_stem_or_their_folder(tmp_path):
    for name in ("celeb.safetensors", "faces/model.ckpt", "faces/b.ckpt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert locate(str(tmp_path / "celeb.safetensors")) == ("celeb", tmp_path / "celeb.safetensors")
    for stem, name in (("model", "faces"), ("b", "b")):
        file = tmp_path / "faces" / f"{stem}.ckpt"
        assert locate(str(file), allow_pickle=True) == (name, file)
        with pytest.raises(ModelPathError, match="--allow-pickle"):
            locate(str(file))
    with pytest.raises(ModelPathError, match="no model at"):
        locate(str(tmp_path / "faces"), allow_pickle=True)


def test_what_a_pickle_is_is_known_when_it_is_allowed(tmp_path):
    torch.save({"state_dict": published("celebahq")}, tmp_path / "celeb.ckpt")
    paths = locate_all((str(tmp_path / "celeb.ckpt"),), allow_pickle=True)
    registry = Registry(paths, lambda source: pytest.fail("loaded"), allow_pickle=True)
    assert registry.specs["celeb"].tasks == ("unconditional",)
    with pytest.raises(CheckpointError, match="allow_pickle"):
        Registry(paths, lambda source: pytest.fail("loaded"))


def test_a_converted_folder_is_a_model(tmp_path):
    convert(write(tmp_path, "celebahq"), tmp_path / "faces")
    assert locate(str(tmp_path / "faces")) == ("faces", tmp_path / "faces")


def test_idle_models_are_unloaded_to_make_room(paths):
    registry = registry_of(paths, 0)
    registry.load_all()
    registry.unload_idle([ModelKey("b")])
    assert loaded(registry) == ["b"]

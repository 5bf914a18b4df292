"""Controls and reference adapters of files: which models they fit, and when they are in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.errors import CheckpointError
from models.formats.identify import read_spec
from models.spec import ControlOption, ModelSpec
from service.catalogue import Catalogue, Entry
from service.device.adapter_store import AdapterFile, AdapterStore
from service.device.adapters import Adapters
from service.device.registry import Registry
from service.device.shelf import Shelf
from service.engine.job import AdapterKey, ModelKey
from service.settings import Settings
from tests.checkpoints import sd_folders
from tests.checkpoints.control_files import (
    control_net,
    difference,
    load_unet,
    write_control,
    write_t2i_adapter,
)
from tests.checkpoints.ip_files import ip_adapter, write_image_encoder, write_ip_adapter
from tests.checkpoints.tiny import write_tiny_control

CPU = torch.device("cpu")
M = ModelKey("m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    model = sd_folders.write(folder, "sd1")
    write_control(folder / "edges", model)
    write_t2i_adapter(folder / "sketch", model)
    write_tiny_control(folder / "other")
    write_ip_adapter(folder / "style.safetensors", ip_adapter(load_unet(model)))
    write_image_encoder(folder / "narrow", projection=16)
    write_image_encoder(folder / "encoder")
    save_file({"weight": torch.zeros(2)}, folder / "nothing.safetensors")
    return folder


@pytest.fixture(scope="module")
def specs(folder) -> dict[str, ModelSpec]:
    return {"m": replace(read_spec(folder / "sd1"), name="m")}


def adapters_of(**settings) -> Adapters:
    return Adapters(Settings(**settings), CPU, torch.float32)


def entry(kind: str, path: Path) -> Entry:
    return Entry(kind, path.stem, str(path), path.name, "1")


def test_an_adapter_is_offered_with_the_models_that_it_fits(folder, specs, tiny):
    controls = tuple(f"{name}={folder / name}" for name in ("edges", "sketch", "other"))
    encoders = (str(folder / "narrow"), str(folder / "encoder"))
    adapters = adapters_of(
        controlnet=controls,
        reference_adapter=(f"style={folder / 'style.safetensors'}",),
        image_encoder=encoders,
    )
    both = specs | {"tiny": replace(read_spec(tiny), name="tiny")}
    adapters.check_given(both)
    found, files = adapters.read(Catalogue(), both, Shelf({}, []))
    edges, sketch = found["m"].controls
    assert (edges.name, edges.kind, edges.every_step) == ("edges", "ControlNet", True)
    assert (sketch.name, sketch.kind, sketch.every_step) == ("sketch", "T2I-Adapter", False)
    assert found["m"].reference_adapters == ("style",)
    assert [option.name for option in found["tiny"].controls] == ["other"]
    assert found["tiny"].reference_adapters == ()
    assert files["reference_adapter", "style"].encoder == str(folder / "encoder")
    assert files["control", "edges"].size > 1000


def test_an_adapter_given_at_start_that_fits_no_model_is_an_error_with_both_numbers(folder, specs):
    with pytest.raises(CheckpointError, match=r"controlnet other: .*have \[32, .*the model's \[16, "):
        adapters_of(controlnet=(f"other={folder / 'other'}",)).check_given(specs)
    style = (f"style={folder / 'style.safetensors'}",)
    with pytest.raises(CheckpointError, match=r"reference_adapter style: .*--image-encoder"):
        adapters_of(reference_adapter=style).check_given(specs)
    with pytest.raises(CheckpointError, match=r"24 wide, the image encoder gives 16"):
        adapters_of(reference_adapter=style, image_encoder=(str(folder / "narrow"),)).check_given(specs)


def test_adapters_in_folders_are_offered_or_ignored_with_the_reason(folder, specs):
    names = ("edges", "other", "nothing.safetensors", "style.safetensors")
    entries = [entry("control", folder / name) for name in names]
    shelf = Shelf({}, [])
    catalogue = Catalogue(1, (*entries, entry("image_encoder", folder / "encoder")))
    found, files = adapters_of().read(catalogue, specs, shelf)
    assert [option.name for option in found["m"].controls] == ["edges"]
    assert found["m"].reference_adapters == ("style",)  # A1111 keeps it among the ControlNets
    reasons = {each.file: each.reason for each in shelf.ignored}
    assert set(reasons) == {"other", "nothing.safetensors"}
    assert "does not fit m" in reasons["other"]
    assert "not a ControlNet" in reasons["nothing.safetensors"]
    assert str(folder) not in "".join(reasons.values())
    again = Shelf(shelf.used, [])
    assert adapters_of().read(catalogue, specs, again)[1] == files


def test_a_control_of_differences_is_loaded_for_each_model(folder, specs, tmp_path):
    unet = load_unet(folder / "sd1")
    file = tmp_path / "diff.safetensors"
    save_file(difference(control_net(unet), {}), file)
    catalogue = Catalogue(1, (entry("control", file),))
    _, files = adapters_of().read(catalogue, specs, Shelf({}, []))
    assert files["control", "diff"].of_model


def key(name: str, model: str = "m") -> AdapterKey:
    return AdapterKey("control", name, model)


def store_of(**files: AdapterFile) -> tuple[AdapterStore, list[str]]:
    """A store, and the names of the adapters that were loaded."""
    loaded: list[str] = []

    def open_(each: AdapterKey, file: AdapterFile, model: object) -> str:
        loaded.append(f"{each.name} {each.model}" if file.of_model else each.name)
        return f"{each.name} {file.version}"

    store = AdapterStore(open_)
    store.install({("control", name): file for name, file in files.items()})
    return store, loaded


def test_models_share_an_adapter_unless_it_changes_their_weights():
    store, loaded = store_of(own=AdapterFile(size=1, of_model=True), shared=AdapterFile(size=1))
    for model in ("m", "n"):
        for name in ("own", "shared"):
            if not store.is_loaded(key(name, model)):
                store.load(key(name, model), None)
    assert loaded == ["own m", "shared", "own n"]
    store.forget_model("m")
    assert [store.is_loaded(key("own", model)) for model in "mn"] == [False, True]


def test_a_shared_encoder_counts_once():
    file = AdapterFile(size=10, encoder="e", encoder_size=100)
    store, _ = store_of(a=file, b=file, c=AdapterFile(size=1))
    assert store.size(key("a")) == 110
    for name in ("a", "c"):
        store.load(key(name), None)
    assert (store.size(key("b")), store.used) == (10, 111)


def test_a_changed_file_is_loaded_again_when_no_job_uses_it():
    store, loaded = store_of(a=AdapterFile(version="1"))
    store.load(key("a"), None)
    store.install({("control", "a"): AdapterFile(version="2")})
    assert not store.is_loaded(key("a"))
    assert not store.drop_stale(key("a"), [key("a", "n")])
    assert store[key("a")] == "a 1"
    assert store.drop_stale(key("a"), [])
    store.load(key("a"), None)
    assert (store[key("a")], loaded) == ("a 2", ["a", "a"])


@pytest.fixture
def registry(tiny) -> Registry:
    """Room for a model of 10 bytes and two adapters of 4."""
    registry: Registry = Registry({"m": tiny}, lambda source: "model", lambda spec: 10, memory=18)
    registry.adapters, _ = store_of(a=AdapterFile(size=4), b=AdapterFile(size=4), c=AdapterFile(size=4))
    return registry


def test_idle_adapters_make_room_for_others(registry):
    busy = [M]
    assert all(registry.make_ready(each, busy) for each in (M, key("a"), key("b"), key("c")))
    assert [registry.is_ready(key(name)) for name in "abc"] == [False, True, True]
    assert not registry.make_ready(key("a"), [M, key("b"), key("c")])
    assert registry.make_ready(key("a"), [M, key("c")])


def test_idle_adapters_make_room_for_a_model(tiny, registry):
    assert all(registry.make_ready(each, [M]) for each in (M, key("a")))
    registry.unload("m")
    assert registry.is_ready(key("a"))
    assert registry.make_ready(M, [])
    assert not registry.is_ready(key("a"))


def test_unload_idle_keeps_busy_adapters(registry):
    assert all(registry.make_ready(each, [M]) for each in (M, key("a"), key("b")))
    registry.unload_idle([M, key("b")])
    assert [registry.is_ready(each) for each in (M, key("a"), key("b"))] == [True, False, True]


def test_control_options_are_part_of_a_models_description():
    option = ControlOption("fill", "ControlNet", types=("tile", "inpaint"))
    assert option.needs_mask("inpaint")
    assert not option.needs_mask("tile")
    assert ControlOption("fill", "ControlNet", inpainting=True).needs_mask(None)

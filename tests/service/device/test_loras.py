"""LoRAs on the engine: named by requests, merged into the model of a job, counted as memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from service.device.loading import build
from service.device.precision import Precision
from service.device.registry import Registry
from service.engine.job import LoraWeights, ModelKey
from service.errors import InvalidRequest
from service.model_paths import ModelPathError, bundled, locate_loras
from service.requests.resolve import resolve
from service.requests.schemas import GenerateRequest
from service.settings import SettingError, Settings, read_settings
from tests.checkpoints.lora_files import (
    ATTENTION,
    TEXT,
    as_peft,
    random_lora,
    shapes_of,
    write_lora,
)
from tests.checkpoints.tiny import tiny_spec
from tests.helpers.fake_runner import make_job
from tests.helpers.torch_runner import run_jobs


def test_the_order_of_names_changes_nothing():
    specs = {"tiny": replace(tiny_spec(), loras=("ink", "oil"))}
    one, other = (
        resolve(GenerateRequest(prompt="p", loras=loras), specs, Settings()).to_job()
        for loras in ({"ink": 1.0, "oil": 0.5}, {"oil": 0.5, "ink": 1.0})
    )
    assert one.model_key == other.model_key == ModelKey("tiny", (("ink", 1.0, 1.0), ("oil", 0.5, 0.5)))
    with pytest.raises(InvalidRequest, match="available: none"):
        resolve(GenerateRequest(prompt="p", loras={"ink": 1.0}), {"tiny": tiny_spec()}, Settings())


def test_weights_for_text_encoders_alone_are_kept_and_come_back_from_an_images_parameters():
    specs = {"tiny": replace(tiny_spec(), loras=("ink", "oil"), lora_warnings=("", "oil is odd"))}
    fields = {"prompt": "p", "loras": {"ink": 0.0, "oil": 0.0}, "lora_text_weights": {"ink": 0.5}}
    resolved = resolve(GenerateRequest(**fields), specs, Settings())
    assert resolved.to_job().model_key == ModelKey("tiny", (("ink", 0.0, 0.5),))
    assert resolved.warnings == ()  # oil changes nothing
    again = resolve(GenerateRequest(**resolved.parameters.of_image(0)), specs, Settings())
    assert again.to_job().model_key == resolved.to_job().model_key


def test_the_bundled_model_takes_a_lora(tmp_path):
    """In bfloat16: merged weights are rounded once."""
    emoji = bundled("emoji")
    file = write_lora(tmp_path / "a.safetensors", as_peft(random_lora(shapes_of(emoji, *ATTENTION, *TEXT))))
    runner = build(Settings(dtype="bfloat16", device="cpu", lora=(f"a={file}",)), {"emoji": emoji})
    assert runner.specs["emoji"].loras == ("a",)
    job = make_job("x", model="emoji", width=64, height=64, steps=2, loras=(LoraWeights("a", 0.5, 0.5),))
    with_it, without = run_jobs(runner, job)["x"], run_jobs(runner, replace(job, loras=()))["x"]
    assert with_it != without
    network = runner.registry.bundle(job.model_key)
    assert network.unet.dtype == torch.bfloat16
    precise = Precision(runner.registry, invariant=False).in_float32(job.model_key)
    (opened,) = runner.registry._open(runner.specs["emoji"], ["a"])
    merged = next(change.target for change in opened.changes if change.target.network == "unet")
    exact, rounded = (each.unet.get_parameter(merged.parameter) for each in (precise, network))
    assert exact.dtype == torch.float32
    assert torch.equal(exact.bfloat16(), rounded)


def registry_of(memory: int, sets: int) -> Registry[str]:
    """A registry whose bundles are strings: a model takes 10 bytes, a LoRA 4."""
    registry = Registry(
        {name: bundled("emoji") for name in ("m", "k")}, lambda path: "base", lambda spec: 10, memory
    )
    registry.offer(lambda spec, names: [4 for _ in names], lambda base, chosen: f"{base}{chosen}", sum, sets)
    registry.load("m")
    return registry


A, B, HALF = (ModelKey("m", loras) for loras in ((("a", 1.0, 1.0),), (("b", 1.0, 1.0),), (("a", 0.5, 0.5),)))


def test_the_least_used_set_goes_when_too_many_are_merged():
    registry = registry_of(0, sets=2)
    assert registry.make_ready(A, ())
    assert registry.make_ready(B, (A,))
    assert not registry.make_ready(HALF, (A, B))
    assert registry.bundle(A) == "base[(4, 1.0, 1.0)]"
    assert registry.make_ready(HALF, ())
    assert [registry.is_ready(network) for network in (A, B, HALF)] == [True, False, True]


def test_merged_sets_count_as_memory_and_go_before_models():
    registry = registry_of(24, sets=9)
    assert registry.make_ready(ModelKey("k"), ())
    assert registry.make_ready(A, ())
    assert not registry.make_ready(B, (A, ModelKey("k")))
    assert registry.make_ready(B, (ModelKey("k"),))  # in the place of A
    assert [registry.is_ready(each) for each in (A, B, ModelKey("k"))] == [False, True, True]
    assert registry.make_ready(A, (B,))  # in the place of k
    assert not registry.is_loaded("k")
    assert registry.make_ready(ModelKey("k"), ())  # both make room
    assert registry.is_loaded("m")
    assert not registry.is_ready(A)


def test_loras_are_named_at_the_start_and_must_exist(tmp_path):
    assert read_settings({"LDM_LORA": "ink=a.safetensors,oil=b"}).lora == ("ink=a.safetensors", "oil=b")
    folder = tmp_path / "style"
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    assert locate_loras([f"s={folder}"]) == {"s": folder / "adapter_model.safetensors"}
    named = "my lora (v2) 墨=a.safetensors"
    assert read_settings({"LDM_LORA": named}).lora == (named,)
    for text in ("nameless.safetensors", "a:b=x", " =x", "=x", "<a>=x"):
        with pytest.raises(SettingError, match="NAME=PATH"):
            read_settings({"LDM_LORA": text})
    for names in ([f"s={tmp_path}"], [f"s={tmp_path / 'no'}"], [f"s={folder}"] * 2):
        with pytest.raises(ModelPathError, match=r"no LoRA at|two LoRAs"):
            locate_loras(names)

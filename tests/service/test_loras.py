"""LoRAs over HTTP and on the engine: each job with its own set, at once with others."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from service.device.loading import build
from service.device.registry import Registry
from service.engine.job import ModelKey
from service.errors import InvalidRequest
from service.model_paths import ModelPathError, bundled, locate_loras
from service.requests.resolve import resolve
from service.requests.schemas import GenerateRequest
from service.settings import SettingError, Settings, read_settings
from tests.checkpoints.lora_files import (
    ATTENTION,
    TEXT,
    as_kohya,
    as_peft,
    random_lora,
    shapes_of,
    write_lora,
)
from tests.checkpoints.tiny import tiny_spec
from tests.helpers.clients import error_of, image_of, post, together
from tests.helpers.fake_runner import make_job
from tests.helpers.images import psnr
from tests.helpers.servers import Server, wait_until
from tests.helpers.torch_runner import run_jobs

SETS = ({}, {"ink": 1.0}, {"ink": 0.4, "oil": -0.6}, {"oil": 0.8}, {"ink": 0.0})


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory) -> dict[str, Path]:
    """One in each style; oil changes texts too."""
    folder = tmp_path_factory.mktemp("loras")
    ink = as_kohya(random_lora(shapes_of(tiny, *ATTENTION, "conv1"), seed=1))
    oil = as_peft(random_lora(shapes_of(tiny, "attn1.to_v", *TEXT), seed=2))
    return {
        name: write_lora(folder / f"{name}.safetensors", tensors)
        for name, tensors in {"ink": ink, "oil": oil}.items()
    }


def named(files: dict[str, Path]) -> str:
    return ",".join(f"{name}={file}" for name, file in files.items())


@pytest.fixture(scope="module")
def serving(start_server, files) -> Iterator[Server]:
    with start_server(LDM_LORA=named(files), LDM_LORA_SETS="2", LDM_INVARIANT="1", LDM_BUCKETS="8") as server:
        yield server


def body_of(index: int) -> dict:
    return {"prompt": f"picture {index % 2}", "seed": index, "steps": 4 + index, "loras": SETS[index % 5]}


def files_of(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [image["data"] for image in answer.json()["images"]]


def test_jobs_with_other_sets_at_once_are_the_pictures_of_each_alone(serving):
    """More sets than fit at a time; the worker dies in the middle."""
    bodies = [body_of(index) for index in range(10)]
    alone = [files_of(post(serving, body)) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        before = serving.calls()
        answers = together(serving, pool, bodies[::-1])
        wait_until(lambda: serving.calls() > before + 6)
        serving.kill_worker()
        assert [files_of(answer.result()) for answer in reversed(answers)] == alone


def test_weight_0_is_none_bit_for_bit_and_others_are_not(serving):
    body = {"prompt": "p", "seed": 3, "steps": 4}
    plain, nothing, ink, less = (
        post(serving, body | {"loras": loras})
        for loras in ({}, {"ink": 0.0, "oil": 0}, {"ink": 1.0}, {"ink": 0.5})
    )
    assert files_of(plain) == files_of(nothing)
    pictures = [image_of(answer) for answer in (plain, ink, less)]
    assert max(psnr(pictures[a], pictures[b]) for a, b in ((0, 1), (0, 2), (1, 2))) < 40


def test_the_models_say_which_they_know_and_others_are_refused(serving):
    assert serving.client.get("/models").json()["models"][0]["loras"] == ["ink", "oil"]
    error = error_of(post(serving, {"prompt": "p", "loras": {"ink": 1.0, "wax": 1.0}}), 422)
    assert error["param"] == "loras"
    assert all(word in error["message"] for word in ("'wax'", "ink, oil"))
    assert error_of(post(serving, {"prompt": "p", "loras": {"ink": 11.0}}), 422)["param"] == "loras.ink"
    assert error_of(post(serving, {"prompt": "p", "loras": ["ink"]}), 422)["param"] == "loras"


def test_a_picture_says_which_it_was_made_with(serving):
    for loras in ({"oil": 0.5, "ink": 1.0}, {}):
        answer = post(serving, {"prompt": "p", "steps": 1, "loras": loras}, accept="image/png")
        made = json.loads(Image.open(io.BytesIO(answer.content)).text["parameters"])
        assert made.get("loras", {}) == loras


def test_the_order_of_names_is_nothing():
    specs = {"tiny": replace(tiny_spec(), loras=("ink", "oil"))}
    one, other = (
        resolve(GenerateRequest(prompt="p", loras=loras), specs, Settings()).to_job()
        for loras in ({"ink": 1.0, "oil": 0.5}, {"oil": 0.5, "ink": 1.0})
    )
    assert one.model_key == other.model_key == ModelKey("tiny", (("ink", 1.0), ("oil", 0.5)))
    with pytest.raises(InvalidRequest, match="available: none"):
        resolve(GenerateRequest(prompt="p", loras={"ink": 1.0}), {"tiny": tiny_spec()}, Settings())


def test_the_model_in_the_box_takes_one_too(tmp_path):
    """In bfloat16, where what is merged is rounded once."""
    emoji = bundled("emoji")
    file = write_lora(tmp_path / "a.safetensors", as_peft(random_lora(shapes_of(emoji, *ATTENTION, *TEXT))))
    runner = build(Settings(dtype="bfloat16", device="cpu", lora=(f"a={file}",)), {"emoji": emoji})
    assert runner.specs["emoji"].loras == ("a",)
    job = make_job("x", model="emoji", width=64, height=64, steps=2, loras=(("a", 0.5),))
    with_it, without = run_jobs(runner, job)["x"], run_jobs(runner, replace(job, loras=()))["x"]
    assert with_it != without
    network = runner.registry.bundle(job.model_key)
    assert network.unet.dtype == torch.bfloat16
    precise = runner._in_float32(job.model_key)
    merged = next(
        c.target for c in runner.registry._loras["emoji"]["a"].changes if c.target.network == "unet"
    )
    exact, rounded = (each.unet.get_parameter(merged.parameter) for each in (precise, network))
    assert exact.dtype == torch.float32
    assert torch.equal(exact.bfloat16(), rounded)


def registry_of(memory: int, sets: int) -> Registry[str]:
    """Bundles are words; a model takes 10 bytes, a LoRA 4."""
    registry = Registry(
        {name: bundled("emoji") for name in ("m", "k")}, lambda path: "base", lambda spec: 10, memory
    )
    loras = {name: {"a": 4, "b": 4} for name in ("m", "k")}
    registry.offer(loras, lambda base, chosen: f"{base}{chosen}", sum, sets)
    registry.load("m")
    return registry


A, B, HALF = (ModelKey("m", loras) for loras in ((("a", 1.0),), (("b", 1.0),), (("a", 0.5),)))


def test_only_so_many_sets_are_merged_at_a_time_and_the_least_used_goes():
    registry = registry_of(0, sets=2)
    assert registry.ready(A, ())
    assert registry.ready(B, (A,))
    assert not registry.ready(HALF, (A, B))
    assert registry.bundle(A) == "base[(4, 1.0)]"
    assert registry.ready(HALF, ())
    assert [registry.has(network) for network in (A, B, HALF)] == [True, False, True]


def test_what_is_merged_counts_and_goes_before_models():
    registry = registry_of(24, sets=9)
    assert registry.ready(ModelKey("k"), ())
    assert registry.ready(A, ())
    assert not registry.ready(B, (A, ModelKey("k")))
    assert registry.ready(B, (ModelKey("k"),))  # in the place of A
    assert [registry.has(each) for each in (A, B, ModelKey("k"))] == [False, True, True]
    assert registry.ready(A, (B,))  # in the place of k
    assert not registry.holds("k")
    assert registry.ready(ModelKey("k"), ())  # both make room
    assert registry.holds("m")
    assert not registry.has(A)


def test_loras_are_named_at_start_and_must_be_there(files, tmp_path):
    assert read_settings({"LDM_LORA": named(files)}).lora == tuple(named(files).split(","))
    folder = tmp_path / "style"
    folder.mkdir()
    (folder / "adapter_model.safetensors").touch()
    assert locate_loras([f"s={folder}"]) == {"s": folder / "adapter_model.safetensors"}
    for text in ("nameless.safetensors", "a b=x", "=x"):
        with pytest.raises(SettingError, match="NAME=PATH"):
            read_settings({"LDM_LORA": text})
    for names in ([f"s={tmp_path}"], [f"s={tmp_path / 'no'}"], [f"s={folder}"] * 2):
        with pytest.raises(ModelPathError, match=r"no LoRA at|two LoRAs"):
            locate_loras(names)

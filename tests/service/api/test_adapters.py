"""LoRAs and textual inversion over HTTP: each job with its own adapters, among others without."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from models.adapters import lora
from models.checkpoint import load
from models.latent_diffusion import to_uint8
from tests.checkpoints.lora_files import (
    ATTENTION,
    TEXT,
    as_kohya,
    as_peft,
    random_lora,
    shapes_of,
    write_lora,
)
from tests.checkpoints.lora_kinds import CASES, LINEAR, LOW_RANK, NATIVE, double, kohya
from tests.helpers.clients import error_of, image_of, post, together
from tests.helpers.images import psnr
from tests.helpers.servers import Server, wait_until

KINDS = ("LoHa of a convolution", "LoKr of a convolution", "full differences", "differences of a norm")
SPACED = "my lora (v2) 墨"
SETS = ({}, {"ink": 1.0}, {"ink": 0.4, "oil": -0.6}, {"oil": 0.8}, {"ink": 0.0})


@pytest.fixture(scope="module")
def files(tiny: Path, tmp_path_factory) -> dict[str, Path]:
    """A LoRA in each of two key styles; oil changes the text encoder too."""
    folder = tmp_path_factory.mktemp("loras")
    ink = as_kohya(random_lora(shapes_of(tiny, *ATTENTION, "conv1"), seed=1))
    oil = as_peft(random_lora(shapes_of(tiny, "attn1.to_v", *TEXT), seed=2))
    return {
        name: write_lora(folder / f"{name}.safetensors", tensors)
        for name, tensors in {"ink": ink, "oil": oil}.items()
    }


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Path]:
    """LoRAs of other kinds; SPACED has a module that the model does not have, and a word of its own."""
    folder = tmp_path_factory.mktemp("kinds")
    tensors = {kind: kohya(module, parts) for kind, (module, parts, _) in CASES.items() if kind in KINDS}
    processor = f"unet.{LINEAR.removesuffix('.to_k')}.processor.to_k_lora"
    tensors["2023"] = {
        f"{processor}.{part}.weight": LOW_RANK[f"lora_{part}.weight"] for part in ("down", "up")
    }
    vector = 3 * torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    words = {"bundle_emb.zebra.emb_params": vector}
    unknown = {"lora_unet_nowhere.lora_up.weight": torch.ones(1)}
    tensors[SPACED] = kohya(LINEAR, LOW_RANK | {"alpha": torch.tensor(2)}) | words | unknown
    return {
        kind: write_lora(folder / f"{index}.safetensors", each)
        for index, (kind, each) in enumerate(tensors.items())
    }


@pytest.fixture(scope="module")
def adapters(start_server, files, kinds, tmp_path_factory) -> Iterator[Server]:
    """A server with LoRAs and the word <cat-toy> of a textual inversion."""
    word = tmp_path_factory.mktemp("embeddings") / "cat.safetensors"
    save_file({"emb_params": 3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}, word)
    settings = {"LDM_LORA_SETS": "2", "LDM_INVARIANT": "1", "LDM_BUCKETS": "8"}
    settings["LDM_LORA"] = ",".join(f"{name}={file}" for name, file in files.items())
    settings["LDM_LORA"] += "," + ",".join(f"{name}={file}" for name, file in kinds.items())
    with start_server(LDM_EMBEDDING=f"<cat-toy>={word}", **settings) as server:
        yield server


def body_of(index: int) -> dict:
    return {"prompt": f"image {index % 2}", "seed": index, "steps": 4 + index, "loras": SETS[index % 5]}


def files_of(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [image["data"] for image in answer.json()["images"]]


def test_jobs_with_different_sets_at_once_give_the_images_of_each_alone(adapters):
    """There are more sets than are merged at a time, and the worker is killed in between."""
    bodies = [body_of(index) for index in range(10)]
    alone = [files_of(post(adapters, body)) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        before = adapters.calls()
        answers = together(adapters, pool, bodies[::-1])
        wait_until(lambda: adapters.calls() > before + 6)
        adapters.kill_worker()
        assert [files_of(answer.result()) for answer in reversed(answers)] == alone


def test_weight_0_is_no_lora_bit_for_bit(adapters):
    body = {"prompt": "p", "seed": 3, "steps": 4}
    plain, nothing, ink, less = (
        post(adapters, body | {"loras": loras})
        for loras in ({}, {"ink": 0.0, "oil": 0}, {"ink": 1.0}, {"ink": 0.5})
    )
    assert files_of(plain) == files_of(nothing)
    images = [image_of(answer) for answer in (plain, ink, less)]
    assert max(psnr(images[a], images[b]) for a, b in ((0, 1), (0, 2), (1, 2))) < 40


def test_unknown_loras_are_refused_and_known_ones_listed(adapters):
    assert adapters.client.get("/models").json()["models"][0]["loras"][:2] == ["ink", "oil"]
    error = error_of(post(adapters, {"prompt": "p", "loras": {"ink": 1.0, "wax": 1.0}}), 422)
    assert error["param"] == "loras"
    assert all(word in error["message"] for word in ("'wax'", "ink, oil"))
    assert error_of(post(adapters, {"prompt": "p", "loras": {"ink": 11.0}}), 422)["param"] == "loras.ink"
    assert error_of(post(adapters, {"prompt": "p", "loras": ["ink"]}), 422)["param"] == "loras"


def test_loras_are_among_the_parameters_of_an_image(adapters):
    for loras in ({"oil": 0.5, "ink": 1.0}, {}):
        answer = post(adapters, {"prompt": "p", "steps": 1, "loras": loras}, accept="image/png")
        made = json.loads(Image.open(io.BytesIO(answer.content)).text["parameters"])
        assert made.get("loras", {}) == loras


def test_a_learned_word_is_listed_and_changes_the_image(adapters):
    assert adapters.client.get("/models").json()["models"][0]["embeddings"] == ["<cat-toy>"]
    prompts = ("a <cat-toy> here", "a <CAT-toy> here", "a cat here")
    learned, same, other = (image_of(post(adapters, {"prompt": prompt, "seed": 1})) for prompt in prompts)
    assert (learned == same).all()
    assert psnr(learned, other) < 60


def to_pixels(images: Tensor) -> np.ndarray:
    """The first of decoded images, as (H, W, 3) uint8."""
    return to_uint8(images)[0].permute(1, 2, 0).numpy()


def expected_image(folder: Path, parameter: str, delta: Callable[[Tensor], Tensor]) -> np.ndarray:
    """The image of "a cat" that the model makes with one changed weight of its UNet."""
    model = load(folder)
    weight = model.unet.get_parameter(parameter)
    with torch.inference_mode():
        weight.copy_(weight.double() + delta(weight.double()))
        images = model.sample(["a cat"], seeds=[5], steps=4, guidance_scale=3.0)
    return to_pixels(images)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_each_kind_changes_images_by_its_formula(adapters, tiny, kind):
    module, parts, formula = CASES[kind]
    body = {"prompt": "a cat", "seed": 5, "steps": 4, "guidance_scale": 3.0}
    plain, ours = (image_of(post(adapters, body | {"loras": loras})) for loras in ({}, {kind: 2.0}))
    leaf = NATIVE[module] + ".weight"
    theirs = expected_image(tiny, leaf, lambda weight: 2 * formula(double(parts), weight))
    assert psnr(ours, theirs) > 45
    assert psnr(ours, plain) < 35


def test_ignored_modules_are_a_warning_and_the_rest_is_applied(adapters, tiny):
    body = {"prompt": "a cat", "seed": 5, "steps": 4, "guidance_scale": 3.0}
    answer = post(adapters, body | {"loras": {SPACED: 2.0}})
    assert answer.json()["warnings"] == [
        f"LoRA {SPACED}: modules that this model does not have are ignored: lora_unet_nowhere"
    ]
    low = double(LOW_RANK)
    theirs = expected_image(
        tiny, NATIVE[LINEAR] + ".weight", lambda _: low["lora_up.weight"] @ low["lora_down.weight"]
    )
    assert psnr(image_of(answer), theirs) > 45
    same = post(adapters, body | {"loras": {"2023": 1.0}})
    assert psnr(image_of(same), theirs) > 45
    assert same.json()["warnings"] == []


def test_a_word_in_a_lora_is_read_as_its_vectors(adapters, tiny, kinds):
    model = load(tiny)
    (ours,) = lora.open_loras({"a": kinds[SPACED]}, {"m": model.spec})["m"].values()
    with torch.inference_mode():
        changed = lora.apply(model, [(ours, 1.0, 1.0)])
        images = changed.sample(["a zebra here"], seeds=[5], steps=4, guidance_scale=3.0)
    body = {"seed": 5, "steps": 4, "guidance_scale": 3.0, "loras": {SPACED: 1.0}}
    learned, other = (
        image_of(post(adapters, body | {"prompt": f"a {word} here"})) for word in ("zebra", "z ebra")
    )
    assert psnr(learned, to_pixels(images)) > 45
    assert psnr(learned, other) < 60


def test_prompts_of_a1111_give_two_weights_and_names_with_spaces(adapters):
    """As the native API makes it from the same numbers."""
    prompt = f"a cat <lora:oil:0.8:0.6><lora:{SPACED}:0.5>"
    body = {"prompt": prompt, "steps": 4, "seed": 5, "cfg_scale": 3.0, "width": 64, "height": 64}
    answer = adapters.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    native = {"loras": {"oil": 0.6, SPACED: 0.5}, "lora_text_weights": {"oil": 0.8}}
    native |= {"prompt": "a cat ", "seed": 5, "steps": 4, "guidance_scale": 3.0, "sampler": "euler"}
    native |= {"prompt_weights": True, "long_prompts": "chunk"}
    first, same, other = (
        post(adapters, each) for each in (native, native, native | {"lora_text_weights": {}})
    )
    theirs = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))
    assert (image_of(first) == np.asarray(theirs)).all()
    assert files_of(first) == files_of(same) != files_of(other)
    error = error_of(post(adapters, {"prompt": "p", "lora_text_weights": {"oil": 1.0}}), 422)
    assert error["param"] == "lora_text_weights"

"""LoRAs and textual inversion over HTTP: each job with its own adapters, among others without."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.checkpoints.lora_files import (
    ATTENTION,
    TEXT,
    as_kohya,
    as_peft,
    random_lora,
    shapes_of,
    write_lora,
)
from tests.helpers.clients import error_of, image_of, post, together
from tests.helpers.images import psnr
from tests.helpers.servers import Server, wait_until

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
def adapters(start_server, files, tmp_path_factory) -> Iterator[Server]:
    """A server with two LoRAs and the word <cat-toy> of a textual inversion."""
    word = tmp_path_factory.mktemp("embeddings") / "cat.safetensors"
    save_file({"emb_params": 3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}, word)
    settings = {"LDM_LORA_SETS": "2", "LDM_INVARIANT": "1", "LDM_BUCKETS": "8"}
    settings["LDM_LORA"] = ",".join(f"{name}={file}" for name, file in files.items())
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
    assert adapters.client.get("/models").json()["models"][0]["loras"] == ["ink", "oil"]
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

"""Long and weighted prompts, over HTTP."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.clients import alone, error_of, image_of, open_image, post, together, worst_psnr
from tests.helpers.images import psnr

LONG = "red apple " * 10  # more than 77 tokens where each byte is one
REQUEST = {"prompt": LONG + "on a blue table", "seed": 1, "steps": 4}


def test_a_long_prompt_is_cut_with_a_warning_or_encoded_in_chunks(server):
    cut, shorter = post(server, REQUEST), post(server, REQUEST | {"prompt": LONG})
    assert "ignored" in cut.json()["warnings"][0]
    assert cut.json()["warnings"][0].endswith("on a blue table")
    assert (image_of(cut) == image_of(shorter)).all()
    chunked = post(server, REQUEST | {"long_prompts": "chunk"})
    assert chunked.json()["warnings"] == []
    assert psnr(image_of(chunked), image_of(cut)) < 40
    parameters = json.loads(open_image(chunked).text["parameters"])
    assert (image_of(post(server, parameters)) == image_of(chunked)).all()
    assert post(server, REQUEST | {"prompt": "a " * 1500, "long_prompts": "chunk"}).json()["warnings"]


def test_a_long_negative_prompt_is_encoded_in_chunks_too(server):
    body = {"prompt": "a red apple", "long_prompts": "chunk", "seed": 1}
    images = [image_of(post(server, body | {"negative_prompt": LONG + end})) for end in ("blue", "green")]
    assert psnr(*images) < 60
    assert psnr(*images) != 99.0


def test_weights_apply_only_on_request(server):
    body = {"prompt": "a (red:1.8) apple", "seed": 1}
    weighted, plain = (image_of(post(server, body | {"prompt_weights": on})) for on in (True, False))
    other = image_of(post(server, {"prompt": "a red apple", "seed": 1}))
    assert 10 < psnr(weighted, other) < 60
    assert psnr(weighted, plain) < 60
    neutral = image_of(post(server, {"prompt": "a (red:1) apple", "seed": 1, "prompt_weights": True}))
    assert (neutral == other).all()


def test_prompts_of_all_lengths_and_kinds_at_once_change_no_image(server):
    bodies = [
        {
            "prompt": "word " * words + "(end:1.4)",
            "seed": words,
            "steps": 30,
            "prompt_weights": bool(words % 2),
        }
        | {"long_prompts": how}
        for words, how in ((1, "chunk"), (20, "chunk"), (21, "cut"), (40, "chunk"), (22, "chunk"), (3, "cut"))
    ]
    expected = alone(server, bodies)
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert worst_psnr(expected, together(server, pool, bodies)) >= 40


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"long_prompts": "chunks"}, "long_prompts"),
        ({"prompt_weights": "yes"}, "prompt_weights"),
        ({"prompt": "(a:11)", "prompt_weights": True}, "prompt"),
        ({"negative_prompt": "(" * 30 + "a", "prompt_weights": True}, "negative_prompt"),
    ],
)
def test_an_invalid_value_is_refused_by_its_field(server, body, param):
    assert error_of(post(server, {"prompt": "p"} | body), 422)["param"] == param

"""Prompts in A1111's syntax, over HTTP."""

from __future__ import annotations

import json

import pytest

from tests.helpers.clients import error_of, image_of, open_image, post
from tests.helpers.images import psnr

BODY = {"prompt": "a red apple", "seed": 1, "steps": 4, "prompt_syntax": "a1111"}


def image(server, prompt: str, **changes):
    return image_of(post(server, BODY | {"prompt": prompt} | changes))


def test_every_kind_of_syntax_changes_the_image(server):
    plain = image(server, "a red apple")
    assert (plain == image_of(post(server, {"prompt": "a red apple", "seed": 1, "steps": 4}))).all()
    for prompt in ("(a red:1.5) apple", "a red AND apple", "a red BREAK apple", "[a red|blue] apple"):
        assert psnr(image(server, prompt), plain) < 60, prompt
    assert psnr(image(server, "[a red:blue:0.25] apple"), plain) < 70
    assert psnr(image(server, "[a red apple:x:0.9999]"), plain) >= 40
    assert psnr(image(server, "a red apple", negative_prompt="[x:y:1]"), plain) < 70


def test_parameters_repeat_a_composed_prompt(server):
    made = post(server, BODY | {"prompt": "[a:b:1] AND c :0.5", "negative_prompt": "(x:1.2)"})
    parameters = json.loads(open_image(made).text["parameters"])
    assert parameters["prompt_syntax"] == "a1111"
    assert (image_of(post(server, parameters)) == image_of(made)).all()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt_syntax": "comfy"}, "prompt_syntax"),
        ({"prompt": " AND ".join("a" * 17)}, "prompt"),
        ({"prompt": "a :11 AND b"}, "prompt"),
        ({"prompt": "[a|(b:11)]"}, "prompt"),
        ({"prompt": "[" + "|".join(map(str, range(80))) + "]", "steps": 100}, "prompt"),
        ({"negative_prompt": "[(a:11):b:2]"}, "negative_prompt"),
    ],
)
def test_too_many_parts_and_weights_are_refused_by_their_field(server, changes, param):
    assert error_of(post(server, BODY | changes), 422)["param"] == param

"""POST /generate and /inpaint over HTTP: seeds, and the parameters that files carry."""

from __future__ import annotations

import json

import pytest

from tests.helpers.clients import image_of, open_image, post
from tests.helpers.images import base64_of, hole, noise, psnr

IMAGE = {"init_image": base64_of(noise(50, 37)), "strength": 0.5}
MASKED = {"image": base64_of(noise(50, 37)), "mask": base64_of(hole((50, 37)))}


@pytest.mark.parametrize(
    ("path", "body", "images"),
    [
        ("/generate", {"prompt": "red apple", "sampler": "unipc", "guidance_scale": 2.0}, {}),
        ("/generate", {"prompt": "a (red:1.3) apple", "prompt_weights": True, "long_prompts": "chunk"}, {}),
        ("/generate", {"prompt": "red apple", "negative_prompt": "blue"}, IMAGE),
        ("/inpaint", {"prompt": "red apple", "eta": 0.5}, MASKED),
    ],
    ids=["text-to-image", "prompt options", "image-to-image", "inpainting"],
)
def test_the_parameters_in_a_file_make_its_image_again(server, path, body, images):
    made = server.client.post(path, json=body | images | {"steps": 4})
    parameters = json.loads(open_image(made).text["parameters"])
    again = server.client.post(path, json=images | parameters)
    assert (image_of(again) == image_of(made)).all()
    assert json.loads(open_image(again).text["parameters"]) == parameters


def test_parameters_hold_the_request_with_its_defaults_and_nothing_else(server):
    made = post(server, {"prompt": "red apple", "seed": 7, "n": 2, "priority": 3, "output_format": "png"})
    defaults = {"width": 64, "height": 64, "steps": 5, "guidance_scale": 3.0, "sampler": "ddim", "eta": 0.0}
    own = {"model": "tiny", "prompt": "red apple", "negative_prompt": "", "seed": 8, "n": 1}
    parameters = json.loads(open_image(made, 1).text["parameters"])
    assert parameters == defaults | own | {"spacing": "leading"}


def test_seed_minus_one_is_drawn(server):
    answers = [post(server, {"prompt": "red apple", "seed": -1, "steps": 1, "n": 2}) for _ in range(2)]
    first, second = ([image["seed"] for image in answer.json()["images"]] for answer in answers)
    assert first != second
    for seed, following in (first, second):
        assert following == seed + 1
        assert 0 <= seed < following < 2**53


def test_the_largest_seed_repeats_exactly(server):
    body = {"prompt": "red apple", "seed": 2**64 - 1, "steps": 2}
    answer = post(server, body)
    assert answer.json()["images"][0]["seed"] == 2**64 - 1
    assert json.loads(open_image(answer).text["parameters"])["seed"] == 2**64 - 1
    alone = post(server, body, accept="image/png")
    assert alone.headers["x-seed"] == str(2**64 - 1)
    assert (image_of(post(server, body)) == image_of(answer)).all()
    assert (image_of(post(server, body | {"seed": 2**64 - 2})) != image_of(answer)).any()


def test_a_seed_beyond_the_numbers_of_javascript_counts_on(server):
    both = post(server, {"prompt": "red apple", "seed": 2**53 - 1, "n": 2, "steps": 2})
    assert [image["seed"] for image in both.json()["images"]] == [2**53 - 1, 2**53]
    second = post(server, {"prompt": "red apple", "seed": 2**53, "steps": 2})
    assert psnr(image_of(second), image_of(both, 1)) >= 40

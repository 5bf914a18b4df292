"""Optional fields that only some models support, over HTTP."""

from __future__ import annotations

import json

import pytest

from tests.helpers.clients import error_of, image_of, open_image, post
from tests.helpers.images import psnr

BODY = {"prompt": "red apple", "seed": 3, "steps": 2}


def test_a_variation_is_repeated_by_its_parameters(server):
    made = post(server, BODY | {"n": 2, "variation": {"seed": 7, "strength": 0.3}})
    assert [image["seed"] for image in made.json()["images"]] == [3, 3]
    parameters = json.loads(open_image(made, 1).text["parameters"])
    assert parameters["variation"] == {"seed": 8, "strength": 0.3}
    assert psnr(image_of(post(server, parameters)), image_of(made, 1)) >= 40
    assert psnr(image_of(made), image_of(made, 1)) < 60


def test_a_variation_without_strength_is_none(server):
    made = post(server, BODY | {"variation": {"strength": 0.0}})
    assert (image_of(made) == image_of(post(server, BODY))).all()
    assert "variation" not in json.loads(open_image(made).text["parameters"])
    drawn = post(server, BODY | {"variation": {"strength": 1.0}})
    seed = json.loads(open_image(drawn).text["parameters"])["variation"]["seed"]
    assert psnr(image_of(drawn), image_of(post(server, BODY | {"seed": seed}))) >= 40


def test_guidance_that_acts_in_a_part_of_the_run_is_repeated_by_its_parameters(server):
    changes = {"guidance_start": 0.5, "guidance_end": 0.75, "guidance_rescale": 0.7}
    made = post(server, BODY | {"steps": 4} | changes)
    parameters = json.loads(open_image(made).text["parameters"])
    assert changes.items() <= parameters.items()
    assert (image_of(post(server, parameters)) == image_of(made)).all()
    assert psnr(image_of(made), image_of(post(server, BODY | {"steps": 4}))) < 60
    everywhere = BODY | {"guidance_start": 0.0, "guidance_end": 1.0, "guidance_rescale": 0.0}
    assert post(server, everywhere).json()["images"] == post(server, BODY).json()["images"]


def test_tiling_changes_the_image_and_is_among_its_parameters(server):
    images = {axes: post(server, BODY | {"tiling": axes}) for axes in ("none", "x", "y", "both")}
    assert len({image_of(answer).tobytes() for answer in images.values()}) == 4
    parameters = json.loads(open_image(images["x"]).text["parameters"])
    assert parameters["tiling"] == "x"
    assert (image_of(post(server, parameters)) == image_of(images["x"])).all()
    assert (image_of(images["none"]) == image_of(post(server, BODY))).all()


def test_a_feature_cache_is_repeated_by_its_parameters_and_named_in_a_warning(server):
    cache = {"interval": 2, "branch": 0}
    made = post(server, BODY | {"steps": 6, "feature_cache": {"interval": 2}})
    assert any("feature_cache" in warning for warning in made.json()["warnings"])
    parameters = json.loads(open_image(made).text["parameters"])
    assert parameters["feature_cache"] == cache
    assert (image_of(post(server, parameters)) == image_of(made)).all()
    plain = post(server, BODY | {"steps": 6})
    assert psnr(image_of(made), image_of(plain)) < 60
    every_call = post(server, BODY | {"steps": 6, "feature_cache": {"interval": 1}}).json()
    assert every_call["images"] == plain.json()["images"]
    assert every_call["warnings"] == plain.json()["warnings"]


def test_the_model_list_names_the_extras_of_each_model(server):
    (model,) = server.client.get("/models").json()["models"]
    guidance = {"guidance_start", "guidance_end", "guidance_rescale", "feature_cache"}
    assert guidance | {"variation", "tiling", "prompt_syntax", "extend"} <= set(model["extras"])
    assert model["limits"]["max_clip_skip"] == 1  # its text encoder has two layers


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"guidance_start": 0.5, "guidance_end": 0.5}, "guidance_end"),
        ({"guidance_start": 1.0}, "guidance_start"),
        ({"guidance_rescale": 1.1}, "guidance_rescale"),
        ({"clip_skip": 2}, "clip_skip"),
        ({"clip_skip": 0}, "clip_skip"),
        ({"tiling": True}, "tiling"),
        ({"variation": {"seed": 1, "strength": 1.1}}, "variation.strength"),
        ({"variation": {"seed": 1}}, "variation.strength"),
        ({"feature_cache": {"interval": 11}}, "feature_cache.interval"),
        ({"feature_cache": {"branch": 100}}, "feature_cache.branch"),
        ({"variation": {"seed": 2**64 - 1, "strength": 0.5}, "n": 2}, "variation.seed"),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_its_field(server, changes, param):
    assert error_of(post(server, BODY | changes), 422)["param"] == param

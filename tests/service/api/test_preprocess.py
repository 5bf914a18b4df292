"""POST /preprocess over HTTP."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.helpers.clients import error_of
from tests.helpers.images import png

SHAPE = np.zeros((40, 60, 3), np.uint8)
SHAPE[10:30, 20:40] = 220


def test_the_control_image_has_the_size_of_the_image(server):
    answer = server.client.post("/preprocess", json={"image": png(SHAPE), "preprocess": "canny"}).json()
    assert (answer["width"], answer["height"], answer["media_type"]) == (60, 40, "image/png")
    made = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"]))))
    assert made.shape == SHAPE.shape
    assert 0 < (made == 255).mean() < 0.2


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_answer_is_a_file_where_the_client_accepts_one(server, kind):
    headers = {"Accept": f"image/{kind}"}
    body = {"image": png(SHAPE), "preprocess": "canny"}
    answer = server.client.post("/preprocess", json=body, headers=headers)
    assert answer.headers["content-type"] == f"image/{kind}"
    made = Image.open(io.BytesIO(answer.content))
    assert (made.format, made.size) == (kind.upper(), (60, 40))


def test_other_accepted_types_are_refused(server):
    body = {"image": png(SHAPE), "preprocess": "canny"}
    answer = server.client.post("/preprocess", json=body, headers={"Accept": "image/gif"})
    assert error_of(answer, 406)["param"] == "Accept"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"preprocess": "openpose"}, "preprocess"),
        ({"preprocess": None}, "preprocess"),
        ({"low": 220}, "low"),
        ({"image": "!"}, "image"),
        ({"scale": 1}, "scale"),
    ],
)
def test_a_wrong_field_is_refused_by_name(server, change, param):
    body = {"image": png(SHAPE), "preprocess": "canny", **change}
    answer = server.client.post("/preprocess", json=body)
    assert error_of(answer, 422)["param"] == param


def test_a_model_without_controls_refuses_them(server):
    control = {"model": "edges", "image": png(SHAPE)}
    answer = server.client.post("/generate", json={"prompt": "apple", "controls": [control]})
    assert error_of(answer, 422)["param"] == "controls.0.model"
    (model, *_) = server.client.get("/models").json()["models"]
    assert model["controls"] == model["control_details"] == model["reference_adapters"] == []

"""POST /inpaint and runs from images: what is asked, what comes back, over HTTP and before it."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from service.engine.events import Previewed
from service.errors import InvalidRequest
from service.requests import response
from service.requests.resolve import resolve
from service.requests.schemas import InpaintRequest
from service.settings import Settings
from tests.checkpoints.tiny import tiny_spec
from tests.helpers.clients import error_of, image_of
from tests.helpers.images import base64_of, hole, noise, psnr

SIZE = (50, 37)  # of no multiple of anything


def body_of(**changes) -> dict:
    body = {"image": base64_of(noise(*SIZE)), "mask": base64_of(hole(SIZE)), "seed": 1, "steps": 4}
    return body | changes


def order(**changes):
    return resolve(InpaintRequest(**body_of(**changes)), {"tiny": tiny_spec()}, Settings(max_pixels=10_000))


def kept(array: np.ndarray) -> np.ndarray:
    """The pixels outside the mask."""
    return array[np.asarray(hole(SIZE)) == 0]


def test_the_canvas_is_padded_to_a_size_of_the_model_and_the_result_is_cut():
    made = order()
    assert (made.canvas_width, made.canvas_height) == (56, 40)
    assert (made.width, made.height) == SIZE
    assert (len(made.inputs.image), len(made.inputs.mask)) == (56 * 40 * 3, 56 * 40)
    assert (made.task, made.parameters.strength, made.prompt) == ("inpainting", 1.0, "")


def test_parameters_are_those_of_the_request_without_its_images():
    parameters = order(strength=0.5).parameters.of_image(1)
    assert (parameters["width"], parameters["height"], parameters["seed"]) == (*SIZE, 2)
    assert parameters["strength"] == 0.5
    assert not {"image", "mask", "id"} & set(parameters)
    json.dumps(parameters)


def test_a_preview_shows_the_clients_part_of_the_canvas():
    made = order()
    preview = response.to_job_preview(made, Previewed(made.id, 0, 2, 7, 5, bytes(7 * 5 * 3)))
    assert (preview.width, preview.height) == (6, 5)  # of 50x37, at an eighth
    assert Image.open(io.BytesIO(base64.b64decode(preview.data))).size == (6, 5)


BAD = [
    ({"mask": base64_of(hole((37, 50)))}, "mask"),
    ({"mask": base64_of(Image.new("L", SIZE, 127))}, "mask"),
    ({"mask": "?"}, "mask"),
    ({"image": "?"}, "image"),
    ({"image": base64_of(noise(200, 100)), "mask": base64_of(hole((200, 100)))}, "image"),
    ({"width": 64}, "width"),
    ({"height": 48}, "height"),
    ({"sampler": "magic"}, "sampler"),
]


@pytest.mark.parametrize(("changes", "param"), BAD, ids=range(len(BAD)))
def test_an_invalid_value_is_refused_by_its_field(changes, param):
    with pytest.raises(InvalidRequest) as refused:
        order(**changes)
    assert refused.value.param == param
    assert refused.value.message.startswith(param)


def test_only_the_masked_pixels_change(server):
    answer = server.client.post("/inpaint", json=body_of(width=SIZE[0], n=2))
    sent = np.asarray(noise(*SIZE))
    for index in (0, 1):
        made = image_of(answer, index)
        assert made.shape == sent.shape
        assert (kept(made) == kept(sent)).all()
    assert psnr(image_of(answer, 0), image_of(answer, 1)) < 40
    assert (image_of(answer) != sent).any()
    again = server.client.post("/inpaint", json=body_of(), headers={"Accept": "image/png"})
    opened = Image.open(io.BytesIO(again.content))
    assert (np.asarray(opened) == image_of(answer)).all()
    assert json.loads(opened.text["parameters"])["width"] == SIZE[0]


@pytest.mark.parametrize("missing", ["image", "mask"])
def test_an_image_and_a_mask_are_required(server, missing):
    body = {name: value for name, value in body_of().items() if name != missing}
    assert error_of(server.client.post("/inpaint", json=body), 422)["param"] == missing


def test_refused_images_leave_no_job_in_the_queue(server):
    for changes, param in BAD[:4]:
        assert error_of(server.client.post("/inpaint", json=body_of(**changes)), 422)["param"] == param
    body = {"prompt": "p", "init_image": base64_of(noise(8, 8), "GIF")}
    assert error_of(server.client.post("/generate", json=body), 422)["param"] == "init_image"
    assert error_of(server.client.post("/generate", json={"prompt": "p", "strength": 0.5}), 422)
    assert server.health()["jobs"] == 0


def test_image_to_image_starts_from_the_image(server):
    """Low strengths of two seeds are nearer to each other than low and full strength."""
    plain = Image.new("RGB", (64, 64), (250, 30, 30))
    body = {"prompt": "p", "seed": 3, "steps": 10, "init_image": base64_of(plain)}
    images = []
    for changes in ({"strength": 0.1}, {"strength": 0.1, "seed": 4}, {"strength": 1.0}):
        answer = server.client.post("/generate", json=body | changes)
        images.append(image_of(answer))
        assert answer.json()["warnings"] == []
    near, other_seed, far = images
    assert psnr(near, other_seed) > psnr(near, far)

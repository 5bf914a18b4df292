"""POST /inpaint and runs from images: what is asked, what comes back, over HTTP and before it."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from service.engine.events import Previewed
from service.errors import InvalidRequest
from service.requests import response
from service.requests.resolve import build_request, resolve
from service.requests.schemas import InpaintRequest
from service.settings import Settings
from tests.checkpoints.tiny import scene_spec, tiny_spec
from tests.helpers.clients import error_of, image_of, open_image
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


SENT, EDGE = noise(50, 37), hole((50, 37)).filter(ImageFilter.GaussianBlur(2))


def inpainted(server, **changes) -> np.ndarray:
    return image_of(server.client.post("/inpaint", json=body_of(**changes)))


@pytest.mark.parametrize("area", ["whole", "masked"])
@pytest.mark.parametrize("fill", ["original", "blur", "noise", "empty"])
def test_outside_the_blurred_mask_pixels_come_back_as_sent(server, area, fill):
    padding = {"padding": 4} if area == "masked" else {}
    made = inpainted(server, mask_blur=2, area=area, fill=fill, **padding)
    outside = np.asarray(EDGE) == 0
    assert (made[outside] == np.asarray(SENT)[outside]).all()
    assert (made[~outside] != np.asarray(SENT)[~outside]).any()


def test_every_option_changes_the_image(server):
    bodies = [
        {"strength": 0.5} | changes
        for changes in ({}, {"mask_blur": 2}, {"area": "masked"}, {"fill": "blur"}, {"fill": "noise"})
    ]
    images = [inpainted(server, **body).tobytes() for body in bodies]
    assert len(set(images)) == len(bodies)


def test_a_masked_area_is_generated_at_the_requested_size(server):
    body = body_of(area="masked", width=96, height=64, padding=3)
    answer = server.client.post("/inpaint", json=body).json()["images"][0]
    assert (answer["width"], answer["height"]) == SIZE
    made = order(area="masked", width=96, height=64, padding=3)
    assert (made.canvas_width, made.canvas_height, made.used_size) == (96, 64, (96, 64))
    parameters = made.parameters.of_image(0)
    assert {name: parameters[name] for name in ("area", "padding", "width", "height")} == {
        "area": "masked", "padding": 3, "width": 96, "height": 64,
    }  # fmt: skip


def test_an_extended_image_needs_no_mask_and_holds_the_image(server):
    body = {name: value for name, value in body_of().items() if name != "mask"}
    extend = {"left": 10, "bottom": 20}
    answer = server.client.post("/inpaint", json=body | {"extend": extend, "mask_blur": 1, "fill": "blur"})
    made = image_of(answer)
    assert made.shape == (57, 60, 3)
    assert (made[:30, 18:] == np.asarray(SENT)[:30, 8:]).all()
    parameters = json.loads(open_image(answer).text["parameters"])
    assert parameters["extend"] == {"left": 10, "top": 0, "right": 0, "bottom": 20}
    again = server.client.post("/inpaint", json=parameters | {"image": body["image"]})
    assert (image_of(again) == made).all()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"padding": 8}, "padding"),
        ({"area": "masked", "width": 97}, "width"),
        ({"area": "some"}, "area"),
        ({"extend": {"left": -1}}, "extend.left"),
        ({"extend": {"left": 200}}, "extend"),
        ({"extend": {"right": 6}, "width": 50}, "width"),
        ({"mask": None, "extend": {}}, "mask"),
        ({"mask_blur": 257}, "mask_blur"),
        ({"fill": "white"}, "fill"),
    ],
)
def test_an_invalid_option_is_refused_by_its_field(changes, param):
    with pytest.raises(InvalidRequest) as refused:
        resolve(
            build_request(InpaintRequest, body_of(**changes)),
            {"tiny": tiny_spec()},
            Settings(max_pixels=10_000),
        )
    assert refused.value.param == param


def test_boxes_are_refused_with_a_masked_area():
    spec = replace(scene_spec(), name="tiny")
    boxes = [{"name": "cat", "x": 0.0, "y": 0.0, "w": 1.0, "h": 1.0}]
    with pytest.raises(InvalidRequest, match="area must be whole"):
        resolve(InpaintRequest(**body_of(area="masked", boxes=boxes)), {"tiny": spec}, Settings())

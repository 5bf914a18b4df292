"""Controls and reference images: what of a request reaches the job, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from models.spec import ControlOption
from service.errors import InvalidRequest
from service.requests.resolve import build_request, resolve
from service.requests.resolved_request import ResolvedRequest
from service.requests.schemas import GenerateRequest, InpaintRequest
from service.settings import Settings
from tests.checkpoints.tiny import tiny_spec
from tests.helpers.images import png

SPEC = replace(
    tiny_spec(),
    controls=(
        ControlOption("edges", "ControlNet"),
        ControlOption("union", "ControlNet", types=("canny", "depth")),
        ControlOption("fill", "ControlNet", inpainting=True),
    ),
    reference_adapters=("style",),
)
SQUARE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
EDGES = {"model": "edges", "image": png(SQUARE)}
STYLE = {"adapter": "style", "image": png(SQUARE[:30, :40])}
MASK = np.zeros((64, 64, 3), np.uint8)
MASK[:32] = 255


def resolved_of(*controls: dict, references: tuple = (), spec=SPEC, **body) -> ResolvedRequest:
    kind = InpaintRequest if "mask" in body else GenerateRequest
    fields = {"prompt": "apple", "controls": list(controls), "reference_images": list(references), **body}
    return resolve(build_request(kind, fields), {"m": spec}, Settings())


def refusal_of(*controls: dict, **body) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        resolved_of(*controls, **body)
    return caught.value


def test_a_job_takes_controls_with_their_pixels():
    resolved = resolved_of(dict(EDGES, scale=0.5, start=0.25, end=0.75, mode="prompt"), EDGES)
    first, second = resolved.to_job().controls
    assert (first.name, first.scale, first.start, first.end, first.mode) == (
        "edges",
        0.5,
        0.25,
        0.75,
        "prompt",
    )
    assert first.image == second.image == SQUARE.tobytes()
    assert (second.scale, second.start, second.end, second.mode) == (1.0, 0.0, 1.0, "balanced")
    assert resolved.warnings == ()


def test_a_job_takes_reference_images_as_they_are():
    (reference,) = resolved_of(references=(dict(STYLE, scale=0.25),)).to_job().references
    assert (reference.adapter, reference.scale) == ("style", 0.25)
    assert (reference.width, reference.height, reference.image) == (40, 30, SQUARE[:30, :40].tobytes())


def test_parameters_have_the_controls_without_their_images():
    parameters = resolved_of(EDGES, references=(STYLE,)).parameters.of_image(0)
    assert parameters["controls"] == [
        {"model": "edges", "scale": 1.0, "start": 0.0, "end": 1.0, "mode": "balanced"}
        | {"preprocess": "none", "low": 100, "high": 200}
    ]
    assert parameters["reference_images"] == [{"adapter": "style", "scale": 1.0, "start": 0.0, "end": 1.0}]
    assert "controls" not in resolved_of().parameters.of_image(0)


def test_a_scale_of_zero_costs_nothing():
    job = resolved_of(dict(EDGES, scale=0.0), references=(dict(STYLE, scale=0),)).to_job()
    assert (job.controls, job.references) == ((), ())


def test_an_image_of_other_proportions_is_cropped_with_a_warning():
    wide = np.zeros((32, 128, 3), np.uint8)
    wide[:, 48:80] = 255  # the centre square
    resolved = resolved_of({"model": "edges", "image": png(wide)})
    assert "controls.0.image is 128x32" in resolved.warnings[0]
    pixels = np.frombuffer(resolved.to_job().controls[0].image, np.uint8).reshape(64, 64, 3)
    assert pixels.mean() > 250


def test_an_image_of_the_same_proportions_is_scaled_without_a_warning():
    resolved = resolved_of({"model": "edges", "image": png(np.full((200, 200, 3), 7, np.uint8))})
    assert resolved.warnings == ()
    assert set(resolved.to_job().controls[0].image) == {7}


def test_an_image_is_preprocessed_at_the_size_of_the_generated_image():
    (control,) = resolved_of(dict(EDGES, preprocess="invert")).to_job().controls
    assert control.image == (255 - SQUARE).tobytes()


def test_the_canvas_of_an_inpainting_request_repeats_the_control_images_edge():
    image = png(np.zeros((60, 60, 3), np.uint8))
    control = np.full((60, 60, 3), 9, np.uint8)
    body = {"image": image, "mask": png(MASK[:60, :60])}
    (made,) = resolved_of({"model": "edges", "image": png(control)}, **body).to_job().controls
    assert made.image == bytes([9]) * (64 * 64 * 3)


def test_an_inpainting_control_takes_the_requests_image():
    resolved = resolved_of({"model": "fill"}, image=png(SQUARE), mask=png(MASK))
    assert resolved.to_job().controls[0].image == SQUARE.tobytes()


def test_a_control_follows_the_region_that_is_repainted():
    image, mask = np.zeros((128, 128, 3), np.uint8), np.zeros((128, 128, 3), np.uint8)
    image[64:, 64:] = 200
    mask[64:, 64:] = 255
    body = {"image": png(image), "mask": png(mask), "area": "masked", "padding": 0}
    size = {"width": 64, "height": 64}
    (control,) = resolved_of({"model": "edges", "image": png(image)}, **body, **size).to_job().controls
    assert set(control.image) == {200}
    assert len(control.image) == 64 * 64 * 3


def test_a_control_type_reaches_the_job():
    assert resolved_of(dict(EDGES, model="union", type="depth")).to_job().controls[0].type == 1


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"scale": 1e9}, "controls.0.scale", "at most 2"),
        ({"scale": -0.1}, "controls.0.scale", "at least 0"),
        ({"start": 0.6, "end": 0.5}, "controls.0.start", "less than end"),
        ({"start": 0.5, "end": 0.5}, "controls.0.start", "less than end"),
        ({"end": 1.5}, "controls.0.end", "at most 1"),
        ({"model": "nope"}, "controls.0.model", "'nope'"),
        ({"model": "union"}, "controls.0.type", "canny, depth"),
        ({"type": "canny"}, "controls.0.type", "one type"),
        ({"model": "fill"}, "controls.0.model", "/inpaint"),
        ({"mode": "hard"}, "controls.0.mode", "balanced"),
        ({"low": 300, "preprocess": "canny"}, "controls.0.low", "at most 255"),
        ({"low": 210, "preprocess": "canny"}, "controls.0.low", "at most high"),
        ({"low": 50}, "controls.0.low", "canny"),
        ({"high": 250, "preprocess": "blur"}, "controls.0.high", "canny"),
        ({"preprocess": "openpose_full"}, "controls.0.preprocess", "trained networks"),
        ({"preprocess": "sharpen"}, "controls.0.preprocess", "one of none, canny"),
        ({"image": "?"}, "controls.0.image", "base64"),
        ({"image": None}, "controls.0.image", "is required"),
        ({"strength": 1.0}, "controls.0.strength", "not a field"),
    ],
)
def test_a_wrong_control_is_refused_by_the_name_of_its_field(change, param, said):
    error = refusal_of(dict(EDGES, **change))
    assert error.param == param
    assert error.message.startswith(param)
    assert said in error.message


def test_too_many_controls_are_refused():
    assert refusal_of(*[EDGES] * 20).param == "controls"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"adapter": "edges"}, "reference_images.0.adapter"),
        ({"scale": 3.0}, "reference_images.0.scale"),
        ({"start": 1.0}, "reference_images.0.start"),
        ({"image": ""}, "reference_images.0.image"),
    ],
)
def test_a_wrong_reference_is_refused_by_the_name_of_its_field(change, param):
    assert refusal_of(references=(dict(STYLE, **change),)).param == param


def test_a_model_without_controls_refuses_them():
    error = refusal_of(EDGES, spec=tiny_spec())
    assert error.param == "controls.0.model"
    assert "available: none" in error.message


def test_guidance_has_two_rows_where_a_control_acts_on_one_prediction_alone():
    assert resolved_of(EDGES, prompt=None).parameters.guidance_scale == 1.0
    assert resolved_of(dict(EDGES, mode="control"), prompt=None).parameters.guidance_scale != 1.0
    assert resolved_of(references=(STYLE,), prompt=None).parameters.guidance_scale != 1.0


def test_pillow_pixels_are_accepted_as_images():
    control = {"model": "edges", "image": Image.fromarray(SQUARE)}
    assert resolved_of(control).to_job().controls[0].image == SQUARE.tobytes()

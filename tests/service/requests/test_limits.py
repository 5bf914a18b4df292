"""The limit of the work of one request: n * UNet calls * pixels."""

from __future__ import annotations

import pytest

from service.errors import InvalidRequest
from service.requests.resolve import resolve
from service.requests.schemas import GenerateRequest, InpaintRequest, UpscaleRequest
from service.settings import Settings
from tests.checkpoints.tiny import tiny_spec, upscaler_spec
from tests.helpers.images import base64_of, noise

SPECS = {spec.name: spec for spec in (tiny_spec(), upscaler_spec())}
PIXELS = 64 * 64
SCENE = {"prompt": "p", "width": 64, "height": 64, "steps": 10}
IMAGE = base64_of(noise(64, 64))
INPAINT = {"prompt": "p", "image": IMAGE, "mask": IMAGE, "steps": 10}


@pytest.mark.parametrize(
    ("request_", "work"),
    [
        (GenerateRequest(**SCENE), 10 * PIXELS),
        (GenerateRequest(**SCENE, n=3), 30 * PIXELS),
        (GenerateRequest(**SCENE | {"width": 256}), 40 * PIXELS),
        (GenerateRequest(**SCENE, sampler="heun"), 19 * PIXELS),
        (GenerateRequest(**SCENE, hires={"scale": 2.0, "strength": 1.0}), (10 + 4 * 10) * PIXELS),
        (InpaintRequest(**INPAINT, n=2, strength=1.0), 20 * PIXELS),
        (UpscaleRequest(image=IMAGE, n=2, steps=7), 14 * 256 * 256),
    ],
    ids=["steps", "n", "width", "a sampler of two calls a step", "two passes", "inpaint", "upscale"],
)
def test_a_request_may_have_so_much_work_and_no_more(request_, work):
    resolve(request_, SPECS, Settings(max_work=work))
    with pytest.raises(InvalidRequest, match=rf"\b{work}\b.* at most {work - 1}"):
        resolve(request_, SPECS, Settings(max_work=work - 1))


def test_the_error_names_the_field_that_costs_most():
    for changes, field in (({"steps": 500}, "steps"), ({"n": 16}, "n"), ({"width": 1024}, "width")):
        with pytest.raises(InvalidRequest) as error:
            resolve(GenerateRequest(**SCENE | changes), SPECS, Settings(max_work=20 * PIXELS))
        assert error.value.param == field

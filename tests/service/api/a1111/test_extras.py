from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from service.api.a1111.extras import read
from service.api.a1111.schemas import ExtraSingleImage
from service.errors import InvalidRequest
from service.settings import Settings


def encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(float)


@pytest.fixture(scope="module")
def small(apple) -> Image.Image:
    return apple.resize((32, 32), Image.Resampling.BICUBIC)


def test_upscaling_by_a_model_or_by_resampling(api, small):
    by_model = api.extra_single_image(small, upscaler_1="emoji-upscale", upscaling_resize=3).image
    by_rule = api.extra_single_image(small, upscaler_1="Lanczos", upscaling_resize=3).image
    assert by_model.size == by_rule.size == (96, 96)
    assert (array(by_model) != array(by_rule)).any()
    assert (array(api.extra_single_image(small).image) == array(small)).all()
    cropped = api.extra_single_image(
        small, resize_mode=1, upscaling_resize_w=80, upscaling_resize_h=40, upscaler_1="Nearest"
    )
    assert cropped.image.size == (80, 40)


def test_several_images(api, small):
    made = api.extra_batch_images([small, small], upscaler_1="Lanczos", upscaling_resize=2)
    assert [image.size for image in made.images] == [(64, 64), (64, 64)]


def test_unsupported_upscaling_is_a_422_that_names_the_field(api, small):
    with pytest.raises(RuntimeError, match="upscaler_1") as caught:
        api.extra_single_image(small, upscaler_1="R-ESRGAN 4x+")
    assert caught.value.args[0] == 422
    with pytest.raises(RuntimeError, match="upscaling_resize"):
        api.extra_single_image(small, upscaler_1="emoji-upscale", upscaling_resize=5)
    with pytest.raises(RuntimeError, match="gfpgan_visibility"):
        api.extra_single_image(small, gfpgan_visibility=0.5)


def test_unknown_fields_are_ignored_with_a_warning(bundled, small):
    body = {"image": encoded(small), "upscaling_resize_crop": True}
    answer = bundled.client.post("/sdapi/v1/extra-single-image", json=body).json()
    assert "upscaling_resize_crop" in answer["html_info"]
    assert Image.open(io.BytesIO(base64.b64decode(answer["image"]))).size == (32, 32)


def test_sides_of_any_size_are_refused_like_others():
    body = ExtraSingleImage(
        image=encoded(Image.new("RGB", (8, 8))),
        resize_mode=1,
        upscaling_resize_w=10**400,
    )
    with pytest.raises(InvalidRequest, match="upscaling_resize_w"):
        read(body, body.image, "image", Settings())

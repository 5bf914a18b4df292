from __future__ import annotations

import cv2
import numpy as np
import pytest

from service.api.a1111.controlnet_modules import (
    CROP,
    FILL,
    JUST,
    MODULES,
    detect,
    find_module,
    fitted,
    perfect_resolution,
)

PIXELS = np.random.default_rng(5).integers(0, 256, (96, 128, 3), np.uint8)
SMOOTH = cv2.GaussianBlur(PIXELS, (0, 0), 6)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_gives_an_image(name):
    made = detect(SMOOTH, MODULES[name], 64, None, None)
    assert made.dtype == np.uint8
    assert made.shape[2] == 3


def test_a_preprocessor_works_at_its_resolution():
    made = detect(SMOOTH, MODULES["canny"], 192, 20, 40)
    resized = cv2.resize(SMOOTH, (256, 192), interpolation=cv2.INTER_CUBIC)
    assert made.shape == (192, 256, 3)
    assert (made[2:-2, 2:-2, 0] == cv2.Canny(resized, 20, 40)[2:-2, 2:-2]).mean() > 0.99


@pytest.mark.parametrize(("a", "b"), [(-1, -1), (None, None), (0, 900)])
def test_thresholds_outside_their_range_are_the_defaults(a, b):
    assert MODULES["canny"].thresholds(a, b) == (100, 200)


def test_names_of_the_page_are_aliases():
    assert find_module("invert (from white bg & black line)") is MODULES["invert"]
    assert find_module("Canny ") is MODULES["canny"]
    assert find_module("depth_midas") is None


def test_tile_resample_is_the_mean_of_areas():
    made = detect(PIXELS, MODULES["tile_resample"], 512, 2.0, None)
    means = PIXELS.reshape(48, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(made - means).max() <= 1
    assert detect(PIXELS, MODULES["tile_resample"], 512, 1.0, None) is PIXELS


def test_lines_are_white_where_the_image_is_dark():
    white = np.full((128, 128, 3), 255, np.uint8)
    white[:, 60:64] = 0
    for name in ("lineart_standard", "scribble_xdog"):
        made = detect(white, MODULES[name], 128, None, None)
        assert made[:, 60:64].mean() > 100
        assert made[:, :30].mean() < 5


def test_resize_modes_stretch_crop_and_fill():
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 16:48] = np.linspace(1, 255, 32, dtype=np.uint8)[None, :, None]
    image[:, :16] = image[:, 48:] = 9
    just, crop, fill = (fitted(image, 32, 32, mode) for mode in (JUST, CROP, FILL))
    assert just.shape == crop.shape == fill.shape == (32, 32, 3)
    assert (crop == image[:, 16:48]).all()
    assert (fill[:8] == 9).all()
    assert (fill[24:] == 9).all()
    assert just[0, 0, 0] == 9


def test_few_colours_are_not_mixed_and_two_stay_two():
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 90, 0], [7, 7, 200]], np.uint8)
    segments = colours[np.random.default_rng(0).integers(0, 4, (32, 32))]
    made = fitted(segments, 80, 80, JUST)
    assert {*map(tuple, made.reshape(-1, 3))} == {*map(tuple, colours)}
    lines = np.zeros((32, 32, 3), np.uint8)
    lines[10:20] = 255
    assert {*np.unique(fitted(lines, 75, 75, JUST))} == {0, 255}


def test_a_perfect_resolution_needs_no_resizing():
    assert perfect_resolution(PIXELS, 512, 512, CROP) == 512
    assert perfect_resolution(PIXELS, 512, 512, FILL) == 384

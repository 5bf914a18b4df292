from __future__ import annotations

import cv2
import numpy as np
import pytest

from service.requests.preprocessing import METHODS, Thresholds, preprocess, refusal

PIXELS = np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)
SHAPES = np.zeros((48, 64, 3), np.uint8)
SHAPES[12:36, 16:48] = (200, 90, 30)


@pytest.mark.parametrize("method", METHODS)
def test_a_control_image_is_an_image_of_the_same_size(method):
    made = preprocess(PIXELS, method, Thresholds())
    assert (made.shape, made.dtype) == (PIXELS.shape, np.uint8)


def test_canny_draws_the_outline_of_a_shape_in_white():
    made = preprocess(SHAPES, "canny", Thresholds())
    rows, columns, _ = np.nonzero(made)
    assert set(np.unique(made)) == {0, 255}
    assert abs(rows.min() - 12) <= 1
    assert abs(rows.max() - 36) <= 1
    assert abs(columns.min() - 16) <= 1
    assert abs(columns.max() - 48) <= 1
    assert not made[16:32, 20:44].any()  # nothing inside


def test_canny_has_the_edges_of_opencv_at_its_thresholds():
    soft = cv2.GaussianBlur(PIXELS, (0, 0), 2)
    for low, high in ((10, 20), (100, 200)):
        made = preprocess(soft, "canny", Thresholds(low, high))
        assert (made[..., 0] == cv2.Canny(soft, low, high)).all()
    assert preprocess(soft, "canny", Thresholds(10, 20)).any()
    assert not preprocess(soft, "canny", Thresholds(254, 255)).any()


def test_invert_and_threshold_by_their_formulas():
    assert (preprocess(PIXELS, "invert", Thresholds()) == 255 - PIXELS).all()
    white = (PIXELS > 127).all(axis=2)
    assert (preprocess(PIXELS, "threshold", Thresholds()) == 255 * white[:, :, None]).all()


def test_blur_keeps_the_mean_and_removes_detail():
    flat = np.full((64, 64, 3), 130, np.uint8)
    assert (preprocess(flat, "blur", Thresholds()) == flat).all()
    assert preprocess(PIXELS, "blur", Thresholds()).std() < 0.2 * PIXELS.std()


def test_a_trained_preprocessor_is_refused_with_what_to_do_instead():
    for name in ("openpose_full", "depth_midas", "HED"):
        assert "send their result" in refusal(name)
    assert "send their result" not in refusal("sharpen")

from __future__ import annotations

import numpy as np
from PIL import Image

from service.api.a1111.resizing import CROP, FILL, STRETCH, resize


def halves() -> Image.Image:
    """40 x 20: red, then blue from the middle on."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    return image


def test_stretching_keeps_everything():
    image = np.asarray(resize(halves(), 20, 20, STRETCH))
    assert image[10, 2].tolist() == [255, 0, 0]
    assert image[10, 17].tolist() == [0, 0, 255]


def test_cropping_keeps_the_middle_and_the_proportions():
    image = resize(halves(), 20, 20, CROP)
    assert image.size == (20, 20)
    assert (np.asarray(image) == np.asarray(halves().crop((10, 0, 30, 20)))).all()


def test_filling_repeats_the_outermost_pixels():
    image = np.asarray(resize(halves(), 40, 60, FILL))
    assert image.shape == (60, 40, 3)
    assert (image[20:40] == np.asarray(halves())).all()
    assert (image[:20] == image[20]).all()
    wide = np.asarray(resize(halves(), 80, 20, FILL))
    assert (wide[:, 20:60] == np.asarray(halves())).all()
    assert (wide[:, 60:] == [0, 0, 255]).all()

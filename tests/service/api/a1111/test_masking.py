from __future__ import annotations

import numpy as np
from PIL import Image

from service.api.a1111.masking import fill, read_mask, region_of


def test_the_region_has_the_proportions_of_the_image_and_stays_inside():
    mask = Image.new("L", (300, 200))
    mask.paste(255, (100, 50, 150, 60))
    assert region_of(mask, 0, 100, 100) == (100, 30, 150, 80)
    assert region_of(mask, 30, 100, 100) == (70, 0, 180, 110)
    mask.paste(255, (0, 0, 300, 10))
    assert region_of(mask, 0, 100, 100) == (0, 0, 300, 200)


def test_a_hole_is_filled_from_the_pixels_around_it():
    image = np.zeros((33, 50, 3), np.uint8)
    image[:, 25:] = 200
    hole = np.zeros((33, 50), bool)
    hole[5:30, 3:47] = True
    image[hole] = 77
    filled = np.asarray(fill(Image.fromarray(image), hole))
    assert (filled[~hole] == image[~hole]).all()
    assert filled[15, 6].mean() < 60 < 140 < filled[15, 44].mean()
    assert not (filled[hole] == 77).all(-1).all()


def test_a_mask_is_its_opacity_or_its_brightness():
    opacity = Image.new("RGBA", (4, 4), (255, 255, 255, 100))
    opacity.putpixel((1, 1), (0, 0, 0, 200))
    rounded, shaded = (read_mask(opacity, False, (0, 0), rounded) for rounded in (True, False))
    assert (rounded.getpixel((0, 0)), rounded.getpixel((1, 1))) == (0, 255)
    assert (shaded.getpixel((0, 0)), shaded.getpixel((1, 1))) == (100, 200)
    assert read_mask(Image.new("RGBA", (4, 4), (0, 0, 0, 255)), False, (0, 0)).getextrema() == (0, 0)


def test_a_mask_may_be_blurred_in_one_direction():
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    blurred = np.asarray(read_mask(mask, False, (4, 0))).astype(int)
    assert 0 < blurred[16, 6] < 255
    assert blurred[6, 16] == 0

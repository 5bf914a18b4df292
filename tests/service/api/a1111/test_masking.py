from __future__ import annotations

import numpy as np
from PIL import Image

from service.api.a1111.masking import read_mask


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

"""Masks, outpainting and pasting: pure functions of pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from service.requests.inpainting import MaskedImage, Paste, blurred, extended, fill, region_of
from tests.helpers.images import hole, noise


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


@pytest.mark.parametrize("region", [None, (3, 1, 43, 31)])
def test_a_repainted_part_fades_into_the_original_and_changes_no_pixel_outside_its_mask(region):
    original = MaskedImage(noise(50, 37), blurred(hole((50, 37)), 2))
    width, height = (50, 37) if region is None else (60, 60)
    made = Paste(original, region).into(np.full((height, width, 3), 255, np.uint8)).astype(int)
    sent, alpha = np.asarray(original.image).astype(int), np.asarray(original.mask)[..., None] / 255
    assert ((alpha > 0) & (alpha < 1)).any()
    assert (made == sent)[np.broadcast_to(alpha == 0, sent.shape)].all()
    assert np.abs(made - (alpha * 255 + (1 - alpha) * sent)).max() <= 1


def test_an_extended_image_is_masked_where_it_is_new_and_fades_out_on_old_pixels():
    image, empty = noise(30, 20), Image.new("L", (30, 20))
    larger = extended(MaskedImage(image, empty), (4, 0, 16, 8), blur=2)
    mask, pixels = np.asarray(larger.mask), np.asarray(larger.image)
    assert pixels.shape == (28, 50, 3)
    assert (pixels[:20, 4:34] == np.asarray(image)).all()
    assert (pixels[:20, 40] == np.asarray(image)[:, -1]).all()
    new = np.ones((28, 50), bool)
    new[:20, 4:34] = False
    assert (mask[new] == 255).all()
    fading = mask[10, 18:34].astype(int)  # towards the new pixels at the right
    assert (np.diff(fading) >= 0).all()
    assert fading[0] == 0
    assert 200 < fading[-1] < 255
    hard = np.asarray(extended(MaskedImage(image, empty), (4, 0, 16, 8), blur=0).mask)
    assert ((hard == 255) == new).all()

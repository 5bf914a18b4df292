"""Tiles cover an image, overlap, and are merged into it again."""

from itertools import pairwise

import numpy as np
import pytest

from models.tiles import cut, merge

SIZES = [(8, 8), (16, 16), (17, 16), (40, 23), (64, 100), (4, 50)]


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_tiles_of_one_size_cover_every_cell_and_overlap_by_a_quarter(h, w):
    tiles = cut(h, w, 16)
    assert tiles.size == (min(h, 16), min(w, 16))
    covered = np.zeros((h, w), int)
    for index in range(len(tiles.corners)):
        part = covered[tiles.slices(index)]
        assert part.shape == tiles.size
        part += 1
    assert covered.min() == 1
    for line, side in (
        (sorted({top for top, _ in tiles.corners}), h),
        (sorted({x for _, x in tiles.corners}), w),
    ):
        assert line[-1] + min(side, 16) == side
        assert all(b - a <= 12 for a, b in pairwise(line))


@pytest.mark.parametrize(("h", "w"), SIZES)
def test_merging_the_tiles_of_an_image_gives_that_image(h, w):
    image = np.random.default_rng(0).random((2 * h, 2 * w, 3), np.float32)
    tiles = cut(h, w, 16)
    whole = merge((image[tiles.slices(index, 2)] for index in range(len(tiles.corners))), tiles, 2)
    assert np.allclose(whole, image, atol=1e-6)


def test_different_tiles_are_blended_where_they_overlap():
    tiles = cut(16, 28, 16)
    assert tiles.corners == ((0, 0), (0, 12))
    row = merge([np.zeros((16, 16, 1)), np.ones((16, 16, 1))], tiles, 1)[8, :, 0]
    assert (row[:12] == 0).all()
    assert (row[16:] == 1).all()
    assert (np.diff(row[11:17]) > 0.15).all()

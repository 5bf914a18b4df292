"""Pictures of latents without D."""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool2d

from models.preview import Projection, colours
from tests.checkpoints.tiny import tiny_model


def test_where_a_latent_is_linear_in_the_colours_they_come_back():
    bundle = tiny_model()
    bundle.encode = lambda x: 0.3 * avg_pool2d(x, 8)[:, [2, 0, 1, 0]] + 0.1
    x = colours(64)[1]  # (3, 64, 64)
    expected = (avg_pool2d(x, 8).movedim(0, -1) + 1) * 127.5
    picture = Projection(bundle)(bundle.encode(x[None])[0])
    assert picture.shape == (8, 8, 3)
    assert (picture.float() - expected).abs().max() <= 1


def test_numbers_that_are_none_are_shown_as_something():
    picture = Projection(tiny_model())(torch.full((4, 8, 8), torch.nan))
    assert picture.dtype == torch.uint8

"""Previews of latents without the VAE decoder."""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool2d

from models.preview import Projection, random_colours
from tests.checkpoints.tiny import tiny_model


def test_a_latent_that_is_linear_in_the_colours_gives_them_back():
    model = tiny_model()
    model.encode = lambda x: 0.3 * avg_pool2d(x, 8)[:, [2, 0, 1, 0]] + 0.1
    x = random_colours(64)[1]  # (3, 64, 64)
    expected = (avg_pool2d(x, 8).movedim(0, -1) + 1) * 127.5
    image = Projection(model)(model.encode(x[None])[0])
    assert image.shape == (8, 8, 3)
    assert (image.float() - expected).abs().max() <= 1


def test_non_finite_latents_give_a_gray_image():
    image = Projection(tiny_model())(torch.full((4, 8, 8), torch.nan))
    assert (image == 128).all()

"""The mixture of two noises, against AUTOMATIC1111's formula written down for one column at a time."""

import numpy as np
import pytest
import torch

from models.sampling.noise import slerp


def draw(seed: int, shape: tuple[int, ...] = (4, 8, 6)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_each_column_turns_by_a_share_of_its_angle(strength):
    low, high = draw(1).double(), draw(2).double()
    mixed = slerp(strength, low, high)
    for channel, column in np.ndindex(4, 6):
        a, b = low[channel, :, column].numpy(), high[channel, :, column].numpy()
        angle = np.arccos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        expected = (np.sin((1 - strength) * angle) * a + np.sin(strength * angle) * b) / np.sin(angle)
        assert np.allclose(mixed[channel, :, column], expected, atol=1e-12)


def test_strengths_0_and_1_give_the_two_noises():
    low, high = draw(1), draw(2)
    assert torch.allclose(slerp(0.0, low, high), low, atol=1e-6)
    assert torch.allclose(slerp(1.0, low, high), high, atol=1e-6)


@pytest.mark.parametrize("high", [draw(1), draw(2, (4, 1, 6)), -draw(1)])
def test_parallel_columns_give_numbers(high):
    low = draw(1, tuple(high.shape))
    assert slerp(0.5, low, high).isfinite().all()

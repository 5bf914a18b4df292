"""What an update learns from, and what of it counts."""

import pytest
import torch

from models.training.diffusion import Batch, in_holes, v_error


def masked(mask: torch.Tensor) -> Batch:
    return Batch(torch.zeros(len(mask), 8, 4, 4), None, mask, None, None)


def test_errors_count_most_in_a_hole_and_all_alike_where_everything_is_painted() -> None:
    mask = torch.ones(2, 1, 4, 4)
    mask[1, 0, 1:] = 0.0
    everywhere, hole = in_holes(masked(mask))
    assert torch.equal(everywhere, torch.ones(1, 4, 4))
    assert hole.mean().item() == pytest.approx(1.0)
    assert hole[0, 0, 0] == 10 * hole[0, 3, 3]


def test_the_error_of_a_cell_counts_by_its_weight() -> None:
    weight = torch.zeros(1, 1, 4, 4)
    weight[..., 0, 0] = 16.0
    ab, density = torch.full((10,), 0.5), torch.full((10,), 0.1)

    def error(wrong: slice) -> float:
        def predict(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            v = z_t.clone()  # of a picture of zeros at this noise: alpha eps
            v[..., wrong, :] += 1.0
            return v

        return v_error(predict, torch.zeros(1, 8, 4, 4), ab, density, weight).item()

    assert error(slice(1, 4)) < 1e-6
    assert abs(error(slice(0, 1)) - 1.0) < 1e-5

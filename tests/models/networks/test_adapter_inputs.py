"""What adapters of other rows change of a row: nothing, to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor

from models.networks.adapter_inputs import AdapterInputs, ImageTokens, RowInputs, combined

SPECIAL = torch.tensor([-0.0, 0.0, 1.5, -3e-40, 65504.0]).expand(3, 2, 1, 5)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def test_a_row_without_residuals_keeps_its_bits_also_negative_zeros():
    residuals = AdapterInputs((torch.randn(1, 2, 1, 5),), torch.randn(1, 2, 1, 5), (torch.randn(1, 2, 1, 5),))
    inputs = combined(3, [RowInputs([1], residuals)])
    added = [*inputs.after_encoder([SPECIAL]), inputs.after_middle(SPECIAL), inputs.after_block(0, SPECIAL)]
    for x in added:
        assert torch.equal(bits(x[[0, 2]]), bits(SPECIAL[[0, 2]]))
        assert not torch.equal(x[1], SPECIAL[1])


def test_a_row_without_image_tokens_keeps_its_bits_also_negative_zeros():
    tokens = ImageTokens(torch.randn(1, 3, 5), torch.randn(1, 3, 5), torch.ones(1))
    (entry,) = combined(3, [RowInputs([1], AdapterInputs(images=(tokens,)))]).images
    q = torch.randn(3, 1, 1, 5)
    attended = SPECIAL[:, :1]
    x = attended + entry.attend(q, slice(0, 5))
    assert torch.equal(bits(x[[0, 2]]), bits(attended[[0, 2]]))
    assert not torch.equal(x[1], attended[1])


def test_residuals_of_a_row_add_up_in_the_order_of_the_parts():
    parts = [AdapterInputs((torch.full((1, 1, 1, 1), value),)) for value in (1.0, 2**-24, -1.0)]
    alone = combined(1, [RowInputs([0], part) for part in parts]).skips[0]
    others = RowInputs([0, 2], AdapterInputs((torch.ones(2, 1, 1, 1),)))
    together = combined(3, [others, *(RowInputs([1], part) for part in parts)]).skips[0]
    assert alone.item() == together[1].item() == 0.0  # in another order the sum is 2^-24


def test_no_parts_are_no_inputs():
    assert combined(4, []) is None

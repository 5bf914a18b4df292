from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from service.device.tensor_tree import map_tensors, tensors_of


@dataclass(frozen=True)
class Inner:
    x: Tensor | None
    scale: float = 1.0


class Outer(NamedTuple):
    y: Tensor
    inner: Inner
    many: tuple[Tensor, ...] = ()


def test_every_tensor_is_mapped_and_everything_else_is_kept():
    tree = Outer(torch.ones(1), Inner(torch.ones(2), 0.5), (torch.ones(3), torch.ones(4)))
    assert map_tensors(len, tree) == Outer(1, Inner(2, 0.5), (3, 4))
    assert map_tensors(len, (None, Inner(None))) == (None, Inner(None))


def test_tensors_come_in_the_order_of_fields():
    tree = Outer(torch.ones(1), Inner(torch.ones(2)), (torch.ones(3),))
    assert [len(x) for x in tensors_of(tree)] == [1, 2, 3]

"""Typed access to torch's module containers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


def module_list(modules: Iterable[M]) -> Sequence[M]:
    """An nn.ModuleList, typed as a sequence of its modules."""
    return cast("Sequence[M]", nn.ModuleList(modules))


def first_norm(layers: nn.Sequential) -> nn.GroupNorm:
    """The GroupNorm that a sequence of layers begins with."""
    norm = layers[0]
    assert isinstance(norm, nn.GroupNorm)
    return norm


def weight_bytes(network: nn.Module) -> int:
    """Memory of a network's parameters."""
    return sum(weight.nbytes for weight in network.parameters())

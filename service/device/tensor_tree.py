"""Tensors in nested tuples and dataclasses: the inputs of a network call as one value.

rows_of() and padded() are for trees in which every tensor has one entry per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")


def map_tensors(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The same tuples and dataclasses with function(tensor) for every tensor; other values are kept."""
    node: Any = tree
    if isinstance(node, Tensor):
        node = function(node)
    elif isinstance(node, tuple):
        parts = [map_tensors(function, part) for part in node]
        node = type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    elif is_dataclass(node) and not isinstance(node, type):
        values = {field.name: map_tensors(function, getattr(node, field.name)) for field in fields(node)}
        node = replace(node, **values)
    mapped: Tree = node
    return mapped


def tensors_of(tree: object) -> list[Tensor]:
    """Every tensor of the tree, in the order of tuples and fields."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def rows_of(tree: Tree, part: slice | Tensor) -> Tree:
    """Some of the rows of every tensor."""
    return map_tensors(lambda x: x[part], tree)


def padded(tree: Tree, count: int) -> Tree:
    """The rows of every tensor, then `count` copies of the first row."""
    return map_tensors(lambda x: torch.cat([x, x[:1].expand(count, *x.shape[1:])]), tree)

"""Networks without memory, whose weights are still to come from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

DRAWN = frozenset({"normal_", "uniform_", "kaiming_uniform_"})


class Undrawn(TorchFunctionMode):
    """Draws no initial values. On the meta device there are none, but the first to be drawn there costs a
    second: torch imports its compiler for it."""

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWN:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Networks made inside are on the meta device: their parameters have shapes and nothing else."""
    with torch.device("meta"), Undrawn():
        yield

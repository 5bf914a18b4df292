"""Builds networks on the meta device, without allocating or initialising weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

INITIALISERS = frozenset({"normal_", "uniform_", "kaiming_uniform_"})


class SkipInitialisation(TorchFunctionMode):
    """Skips the drawing of initial values.

    On the meta device it has no effect but takes a second, because torch imports its compiler for it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Networks made inside are on the meta device: their parameters have shapes and no values."""
    with torch.device("meta"), SkipInitialisation():
        yield

"""A stand-in for the parts of torch.cuda that capture graphs, with torch's rules about pools and streams.

The rules are those of CUDAGraph.cpp and CUDACachingAllocator.cpp in torch 2.11 to 2.13. A graph is a list of
operators on tensors with fixed memory. A replay repeats these; all else keeps its value of the capture.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Pool = tuple[int, int]
OPERATION_NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
INVALIDATED = "CUDA error: operation failed due to a previous error during capture"
GRAPH_BYTES = 1000
READS_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")  # so they wait for the device


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        pass


class FakeCuda:
    """The state of a device and its allocator. fail_ends: captures whose end fails, for tests to set."""

    def __init__(self) -> None:
        self.default = self.current = FakeStream()
        self.pools = itertools.count(1)
        self.seen: set[Pool] = set()  # pools that were captured into
        self.users: Counter[Pool] = Counter()  # live graphs of each pool
        self.captures_underway: list[Pool] = []
        self.free = 10**9
        self.fail_ends = 0
        self.replays = 0

    def graph_pool_handle(self) -> Pool:
        return (0, next(self.pools))

    def current_stream(self, device: object = None) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def empty_cache(self) -> None:
        assert not self.captures_underway, "INTERNAL ASSERT FAILED: captures_underway.empty()"

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return self.free, 10**9

    def graph(self) -> FakeGraph:
        return FakeGraph(self)


class Operators(TorchDispatchMode):
    """Notes the operators that run inside it. broken: one of them read values, which no capture permits."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.broken = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).removeprefix("aten.").split(".")[0] in READS_VALUES:
            self.broken = True
            raise RuntimeError(OPERATION_NOT_PERMITTED)
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def repeat(self) -> None:
        """Run the operators again, with the results in the same memory."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and memory_of(old) != memory_of(new):
                    old.copy_(new)  # neither a view of an argument, nor computed in place


def memory_of(x: Tensor) -> int:
    """The address of a tensor's memory, which its views share."""
    return x.untyped_storage().data_ptr()


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.stream: FakeStream | None = None
        self.pool: Pool | None = None
        self.operators = Operators()

    def capture_begin(self, pool: Pool, capture_error_mode: str) -> None:
        cuda = self.cuda
        if cuda.current is cuda.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if pool in cuda.seen and not cuda.users[pool]:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        assert capture_error_mode == "thread_local"
        self.stream, self.pool = cuda.current, pool
        cuda.seen.add(pool)
        cuda.users[pool] += 1
        cuda.free -= GRAPH_BYTES
        cuda.captures_underway.append(pool)
        weakref.finalize(self, self.release, cuda, pool)
        self.operators.__enter__()

    def capture_end(self) -> None:
        self.operators.__exit__(None, None, None)
        if self.cuda.current is not self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        if self.cuda.fail_ends or self.operators.broken:
            self.cuda.fail_ends = max(self.cuda.fail_ends - 1, 0)
            raise RuntimeError(INVALIDATED)
        self.cuda.captures_underway.remove(self.pool)

    def replay(self) -> None:
        self.cuda.replays += 1
        self.operators.repeat()

    @staticmethod
    def release(cuda: FakeCuda, pool: Pool) -> None:
        cuda.users[pool] -= 1
        cuda.free += GRAPH_BYTES


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Put a FakeCuda in the place of torch.cuda's functions and classes."""
    cuda = FakeCuda()
    for name in ("graph_pool_handle", "current_stream", "stream", "empty_cache", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", cuda.graph)
    return cuda

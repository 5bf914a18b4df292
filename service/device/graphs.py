"""CUDA graphs of network calls: captured once per set of input shapes, then replayed without Python."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from cachetools import LRUCache
from torch import Tensor, nn

from service.device.tensor_tree import map_tensors, tensors_of

log = logging.getLogger(__name__)

MAX_GRAPHS = 24  # each holds its inputs, its output and some megabytes of driver memory
WARM_UPS = 2  # calls before a capture, in which libraries choose kernels and allocate workspaces

Function = Callable[..., Tensor]
Inputs = tuple[Any, ...]  # tensors, or tuples and dataclasses of tensors; see tensor_tree


class Recording(Protocol):
    """A recorded call, which can be repeated with other values."""

    def replay(self, inputs: Inputs) -> Tensor:
        """Repeat the call with inputs of the same shapes; later replays do not overwrite the result."""


Recorder = Callable[[Function, Inputs], Recording]


@dataclass
class Entry:
    """Calls of one network with inputs of one set of shapes."""

    network: weakref.ref[nn.Module]  # weak: a graph must not keep the weights of an unloaded model alive
    recording: Recording | None = None
    calls: int = 0
    failed: bool = False


class Graphs:
    """Runs calls: the first with a set of input shapes directly, later ones by replaying a recording.

    The least recently used recordings are dropped first. Calls that cannot be recorded run directly; without
    a recorder, all calls do.
    """

    def __init__(self, record: Recorder | None = None, max_graphs: int = MAX_GRAPHS) -> None:
        self._record = record
        self._entries: LRUCache[Hashable, Entry] = LRUCache(max_graphs)
        self._paused = False

    def run(self, network: nn.Module, function: Function, *inputs: Any) -> Tensor:
        """function(*inputs), a function that uses the weights of `network`.

        Everything in the inputs that is not a tensor is part of what a recording is for, as shapes are.
        """
        if self._record is None:
            return function(*inputs)
        entry = self._entry(network, inputs)
        entry.calls += 1
        if self._paused or entry.calls == 1:
            return function(*inputs)
        recording = self._recording(entry, function, inputs)
        return function(*inputs) if recording is None else recording.replay(inputs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside this context calls run directly, so that their memory can be measured."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def prune(self) -> None:
        """Forget recordings of networks that were unloaded."""
        for key in [key for key, entry in self._entries.items() if entry.network() is None]:
            del self._entries[key]

    def clear(self) -> None:
        """Forget all recordings, so that their memory can be freed."""
        self._entries.clear()

    def _entry(self, network: nn.Module, inputs: Inputs) -> Entry:
        key = (id(network), map_tensors(lambda x: (x.shape, x.dtype), inputs))
        entry = self._entries.get(key)
        if entry is None or entry.network() is not network:  # the id may belong to a new network
            self.prune()
            entry = self._entries[key] = Entry(weakref.ref(network))
        return entry

    def _recording(self, entry: Entry, function: Function, inputs: Inputs) -> Recording | None:
        """The recording, made now if there is none; None if the call cannot be recorded."""
        if entry.recording is None and not entry.failed and self._record is not None:
            try:
                entry.recording = self._record(function, inputs)
            except Exception:
                entry.failed = True
                log.warning(
                    "a network call cannot be captured as a CUDA graph; running it directly", exc_info=True
                )
        return entry.recording


class CudaRecorder:
    """Captures CUDA graphs, all in one memory pool.

    Graphs can share the pool because they never run at the same time, and each result is copied before
    another graph can overwrite it.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function, inputs: Inputs) -> CudaRecording:
        """Capture a call. The function must neither wait for the device nor read tensor values."""
        static_inputs = map_tensors(Tensor.clone, inputs)
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function(*static_inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = function(*static_inputs)
        return CudaRecording(graph, static_inputs, out)


@dataclass(frozen=True)
class CudaRecording:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    out: Tensor

    def replay(self, inputs: Inputs) -> Tensor:
        for target, x in zip(tensors_of(self.inputs), tensors_of(inputs), strict=True):
            target.copy_(x)
        self.graph.replay()
        return self.out.clone()


def graphs_on(device: torch.device) -> Graphs:
    """CUDA graphs on a CUDA device; elsewhere every call runs directly."""
    return Graphs(CudaRecorder() if device.type == "cuda" else None)

"""Calls of networks, recorded once and replayed without Python: a CUDA graph for each shape of inputs."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from cachetools import LRUCache
from torch import Tensor, nn

log = logging.getLogger(__name__)

MOST = 24  # graphs kept: each holds its inputs, its output and some megabytes of the driver's
WARM_UPS = 2  # calls before a recording: libraries choose their kernels and take their workspaces in them

Function = Callable[..., Tensor]
Inputs = tuple[Tensor | None, ...]


class Recording(Protocol):
    """One call that can be made again."""

    def replay(self, inputs: Inputs) -> Tensor:
        """The call with other numbers of the same shapes; the result is the caller's own."""


Recorder = Callable[[Function, Inputs], Recording]


@dataclass
class Entry:
    """What is known of one kind of call."""

    network: weakref.ref[nn.Module]  # not the network itself: a graph keeps no weights alive
    recording: Recording | None = None
    calls: int = 0
    failed: bool = False


class Graphs:
    """Makes calls: the first of a kind as it is, later ones from a recording, the least recently used of
    which go first. What cannot be recorded is called as it is. Without a recorder everything is.
    """

    def __init__(self, record: Recorder | None = None, most: int = MOST) -> None:
        self._record = record
        self._entries: LRUCache[Hashable, Entry] = LRUCache(most)
        self._paused = False

    def run(self, network: nn.Module, function: Function, *inputs: Tensor | None) -> Tensor:
        """function(*inputs), whose weights are those of the network."""
        if self._record is None:
            return function(*inputs)
        entry = self._entry(network, inputs)
        entry.calls += 1
        if self._paused or entry.calls == 1 or not self._recorded(entry, function, inputs):
            return function(*inputs)
        return entry.recording.replay(inputs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls as they are, for as long as the context lasts: to measure what they take."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def prune(self) -> None:
        """Forget recordings of networks that have gone."""
        for key in [key for key, entry in self._entries.items() if entry.network() is None]:
            del self._entries[key]

    def clear(self) -> None:
        """Forget all, so that their memory can be given back."""
        self._entries.clear()

    def _entry(self, network: nn.Module, inputs: Inputs) -> Entry:
        key = (id(network), *(None if x is None else (x.shape, x.dtype) for x in inputs))
        entry = self._entries.get(key)
        if entry is None or entry.network() is not network:  # another one may have come to its address
            self.prune()
            entry = self._entries[key] = Entry(weakref.ref(network))
        return entry

    def _recorded(self, entry: Entry, function: Function, inputs: Inputs) -> bool:
        """Whether there is a recording, made now if there was none."""
        if entry.recording is None and not entry.failed:
            try:
                entry.recording = self._record(function, inputs)
            except Exception:
                entry.failed = True
                log.warning("a call cannot be recorded; it is made as it is", exc_info=True)
        return entry.recording is not None


class CudaRecorder:
    """Records CUDA graphs, all in one pool of memory: they never run at the same time, and a result is copied
    out before another of them may write over it.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function, inputs: Inputs) -> CudaRecording:
        """A function that neither waits for the device nor looks at its numbers."""
        given = tuple(None if x is None else x.clone() for x in inputs)
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function(*given)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = function(*given)
        return CudaRecording(graph, given, out)


@dataclass(frozen=True)
class CudaRecording:
    """A graph, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    given: Inputs
    out: Tensor

    def replay(self, inputs: Inputs) -> Tensor:
        for to, x in zip(self.given, inputs, strict=True):
            if to is not None:
                to.copy_(x)
        self.graph.replay()
        return self.out.clone()


def graphs_on(device: torch.device) -> Graphs:
    """Graphs where the device has them."""
    return Graphs(CudaRecorder() if device.type == "cuda" else None)

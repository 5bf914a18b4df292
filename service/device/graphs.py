"""Records calls of networks, and replays the recordings without Python: on a GPU as CUDA graphs."""

from __future__ import annotations

import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from cachetools import LRUCache
from torch import nn

from service.device.tensor_tree import map_tensors
from service.device.torch_errors import is_device_lost, is_oom
from service.engine.graph_counts import GraphCounts

log = logging.getLogger(__name__)

RECORD_AT = 3  # the call of its kind that is recorded; rarer kinds are not worth the time
RETRY_FACTOR = 4  # after running out of memory, the next attempt waits for so many times more calls
IDLE_CALLS = (
    500  # calls of all kinds since its last replay, after which a recording may be dropped for another
)
NEVER = math.inf
MAX_KINDS = 4096  # kinds of calls that are counted

Function = Callable[..., Any]  # returns a tensor, or tuples and dataclasses of tensors
Inputs = tuple[Any, ...]  # tensors, or tuples and dataclasses of tensors; see tensor_tree


Result = TypeVar("Result")


class Recording(Protocol):
    """A recorded call, which can be repeated with other values."""

    @property
    def size(self) -> int:
        """Bytes of device memory that it occupies."""

    def replay(self, inputs: Inputs) -> Any:
        """Repeat the call with inputs of the same shapes; later replays do not overwrite the result."""


Recorder = Callable[[Function, Inputs], Recording]


@dataclass
class Kind:
    """Calls of one function of a network with inputs of one set of shapes."""

    network: weakref.ref[nn.Module]  # weak: a graph must not keep the weights of an unloaded model alive
    record_at: float
    calls: int = 0
    recording: Recording | None = None
    last_used: int = 0  # number of calls of all kinds, at its last replay


class Graphs:
    """Runs calls: the first few of a kind directly, later ones by replaying a recording.

    A kind is a function of a network and the shapes of its inputs. Recordings take at most `max_bytes` (0: no
    limit). When they do, a new one replaces those that were not used for `idle_calls` calls; while there are
    none, further kinds run directly, so that many kinds in turn do not drop each other's recordings. Calls
    that cannot be recorded run directly; without a recorder, all calls do.
    """

    def __init__(
        self,
        record: Recorder | None = None,
        max_bytes: int = 0,
        record_at: int = RECORD_AT,
        idle_calls: int = IDLE_CALLS,
    ) -> None:
        self._record = record
        self._max_bytes = max_bytes
        self._record_at = record_at
        self._idle_calls = idle_calls
        self._kinds: LRUCache[Hashable, Kind] = LRUCache(MAX_KINDS)  # without a recording
        self._recorded: OrderedDict[Hashable, Kind] = OrderedDict()  # by last use
        self._calls = 0
        self._paused = False
        self.counts = GraphCounts()
        self.slow_calls = 0  # calls that were the first of their kind, or were recorded: no measure of speed

    @property
    def size(self) -> int:
        """Bytes of all recordings."""
        return self.counts.bytes

    def _count(self, **more: int) -> None:
        """Add to the counts, which another thread may read."""
        size = sum(kind.recording.size for kind in self._recorded.values() if kind.recording)
        changed = {name: getattr(self.counts, name) + number for name, number in more.items()}
        self.counts = self.counts._replace(bytes=size, **changed)

    def _drop(self, keys: Sequence[Hashable]) -> None:
        """Forget recordings."""
        for key in keys:
            del self._recorded[key]
        self._count(dropped=len(keys))

    def run(self, network: nn.Module, function: Callable[..., Result], *inputs: Any) -> Result:
        """function(*inputs), a function that uses the weights of `network`.

        Everything in the inputs that is not a tensor is part of what a recording is for, as shapes are.
        Raises CaptureFailed if the device cannot be used after an attempt to record.
        """
        if self._record is None:
            return function(*inputs)
        self._calls += 1
        key, kind = self._find(network, function, inputs)
        kind.calls += 1
        if self._paused or kind.calls == 1:
            self.slow_calls += 1
            self._count(direct=1)
            return function(*inputs)
        if kind.recording is None and kind.calls >= kind.record_at and self._make_room():
            self.slow_calls += 1
            kind.recording = self._try_to_record(self._record, kind, function, inputs)
            if kind.recording:
                self._recorded[key] = kind
                del self._kinds[key]
            self._count(**{"recorded" if kind.recording else "failed": 1})
        if kind.recording is None:
            self._count(direct=1)
            return function(*inputs)
        self._count(replayed=1)
        kind.last_used = self._calls
        self._recorded.move_to_end(key)
        result: Result = kind.recording.replay(inputs)
        return result

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
        for key in [key for key, kind in self._kinds.items() if kind.network() is None]:
            del self._kinds[key]
        self._drop([key for key, kind in self._recorded.items() if kind.network() is None])

    def clear(self) -> None:
        """Forget all recordings, so that their memory can be freed."""
        self._kinds.clear()
        self._drop(list(self._recorded))

    def _find(self, network: nn.Module, function: Function, inputs: Inputs) -> tuple[Hashable, Kind]:
        """The kind of a call, and its key."""
        name = getattr(function, "__qualname__", type(function).__qualname__)
        key = (id(network), name, map_tensors(lambda x: (x.shape, x.dtype), inputs))
        kind = self._recorded.get(key) or self._kinds.get(key)
        if kind is None or kind.network() is not network:  # the id may belong to a new network
            self.prune()
            kind = self._kinds[key] = Kind(weakref.ref(network), self._record_at)
        return key, kind

    def _make_room(self) -> bool:
        """Whether there is memory for another recording, after dropping idle ones if necessary."""
        while self._max_bytes and self.size >= self._max_bytes:
            key, oldest = next(iter(self._recorded.items()))
            if self._calls - oldest.last_used < self._idle_calls:
                return False
            self._drop([key])
        return True

    def _try_to_record(
        self, record: Recorder, kind: Kind, function: Function, inputs: Inputs
    ) -> Recording | None:
        """A recording of the call; None if it cannot be recorded, or not now. Raises CaptureFailed."""
        try:
            return record(function, inputs)
        except Exception as error:
            if is_device_lost(error):
                raise
            if isinstance(error, torch.OutOfMemoryError) or is_oom(error):
                kind.record_at = RETRY_FACTOR * kind.calls
                log.warning("no memory to record a network call; running it directly")
            else:
                kind.record_at = NEVER
                log.warning("a network call cannot be recorded; running it directly", exc_info=True)
            return None

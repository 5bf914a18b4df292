"""Steps of images within the device's memory: calls are measured, and one that does not fit is divided."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

from torch import Tensor

from service.device.batch import advance
from service.device.state import ImageState, JobState
from service.device.torch_errors import translate_oom
from service.device.workspace import Workspace
from service.engine.events import Incident
from service.engine.row_limits import MemoryUse
from service.errors import OutOfMemory

MEASURE_EVERY = 64  # calls of a group's largest size between two measurements of its memory


class CallLoad(NamedTuple):
    """What a UNet call's memory depends on: its rows, padding included, and their uses of controls."""

    rows: int
    controls: int

    def exceeds(self, other: CallLoad) -> bool:
        return self.rows > other.rows or self.controls > other.controls


class Stepper:
    """Makes the next states of images. buckets: sizes of calls; room: as in TorchRunner."""

    def __init__(self, workspace: Workspace, buckets: tuple[int, ...], room: int) -> None:
        self._workspace = workspace
        self._buckets = buckets
        self._room = room
        self._calls = 0
        self._measured: dict[Hashable, CallLoad] = {}  # group -> the largest call whose memory was measured

    def forget_measurements(self) -> None:
        """Measure every group again: the free memory has changed."""
        self._measured.clear()

    def advance(
        self, states: Sequence[JobState], images: Sequence[ImageState], size: int
    ) -> tuple[Tensor, MemoryUse | None]:
        """The next states, and the call's memory use if it was measured.

        If one image alone does not fit in memory, it runs row by row, or with `invariant` in the same size
        again. Raises OutOfMemory for calls of several images, which the engine splits.
        """
        try:
            return self._advance_measured(states, images, size)
        except OutOfMemory:
            if len(images) > 1:
                raise
            self._workspace.report_incident(Incident("out_of_memory", "step"))
        self._workspace.free()
        with translate_oom(), self._workspace.graphs.paused():
            size, sizes = (size, self._buckets) if self._workspace.invariant else (1, (1,))
            return advance(states, images, size, sizes=sizes), None

    def _advance_measured(
        self, states: Sequence[JobState], images: Sequence[ImageState], size: int
    ) -> tuple[Tensor, MemoryUse | None]:
        """As advance(); measures the first call of each size, and the largest one again at intervals."""
        group = states[0].phase(images[0]).group
        largest = self._measured.get(group, CallLoad(0, 0))
        load = CallLoad(size, count_controls(states, images))
        self._calls += 1
        memory = self._workspace.memory
        again = not memory.exact and load == largest and self._calls % MEASURE_EVERY == 0
        measuring = (again or load.exceeds(largest)) and memory.begin()
        graphs = self._workspace.graphs
        # The memory of a captured graph is allocated already, so only a call without graphs can be measured.
        with translate_oom(), graphs.paused() if measuring else nullcontext():
            new_states = advance(states, images, size, graphs, self._buckets)
        if not measuring:
            return new_states, None
        self._measured[group] = CallLoad(*map(max, load, largest))
        return new_states, memory.end(size, self._room, graphs.size)


def count_controls(states: Sequence[JobState], images: Sequence[ImageState]) -> int:
    """How often rows of the next call use a control."""
    pairs = zip(states, images, strict=True)
    return sum(len(state.controls(image)) * len(state.rows(image).rows) for state, image in pairs)

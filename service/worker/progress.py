"""The progress of a job, for its watchers. Only the newest state is kept; it never goes backwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from service.engine.events import Previewed

Stage = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class State:
    """The state of a job at one moment.

    position: in the queue, from 1; estimate: seconds until the job ends, if known; step, steps: the number of
    steps done and the total, of all images together; preview: the newest one; device_seconds: the job's part
    of the time of its UNet calls, by rows; number: of the state, from 0.
    """

    stage: Stage = "queued"
    position: int | None = None
    estimate: float | None = None
    step: int = 0
    steps: int = 0
    preview: Previewed | None = None
    device_seconds: float = field(default=0.0, compare=False)
    number: int = field(default=0, compare=False)

    @property
    def ended(self) -> bool:
        return self.stage not in ("queued", "running")


class Progress:
    """The newest state of one job.

    A slow watcher misses states in between. A job that runs again in another worker shows no state twice.
    """

    def __init__(self) -> None:
        self.state = State()
        self._changed = asyncio.Event()
        self._preview_steps: dict[int, int] = {}  # image -> step of its newest preview

    def wait_at(self, position: int, estimate: float | None) -> None:
        """Set the queue position; ignored if the job has started in an earlier worker."""
        if self.state.stage == "queued":
            self._change(position=position, estimate=estimate)

    def start(self, steps: int) -> None:
        """Change to "running"; ignored if the job has started in an earlier worker."""
        if self.state.stage == "queued":
            self._change(stage="running", position=None, estimate=None, steps=steps)

    def advance(self, step: int, seconds: float = 0.0) -> None:
        """Set the number of steps done, after more seconds; ignored if it is not larger than before."""
        if self.state.stage == "running" and step > self.state.step:
            self._change(step=step, device_seconds=self.state.device_seconds + seconds)

    def show(self, preview: Previewed) -> None:
        """Set the newest preview; ignored if its image had a later one, in an earlier worker."""
        if self.state.stage == "running" and preview.step > self._preview_steps.get(preview.index, 0):
            self._preview_steps[preview.index] = preview.step
            self._change(preview=preview)

    def follow(self, state: State) -> None:
        """Take over a state of the job in another process, as far as it is later than this one."""
        if state.stage == "queued" and state.position is not None:
            self.wait_at(state.position, state.estimate)
        if state.stage == "running":
            self.start(state.steps)
            self.advance(state.step, max(0.0, state.device_seconds - self.state.device_seconds))
        if state.preview:
            self.show(state.preview)

    def end(self, stage: Stage) -> None:
        """Set the final stage; every later call is ignored."""
        if not self.state.ended:
            self._change(stage=stage, position=None, estimate=None, preview=None)

    def _change(self, **changes: Any) -> None:
        state = replace(self.state, **changes)
        if state != self.state:
            self.state = replace(state, number=state.number + 1)
            self._changed.set()
            self._changed = asyncio.Event()

    async def after(self, seen: State | None) -> State:
        """Wait until the state is another one than `seen`; returns the newest."""
        while self.state is seen:
            await self._changed.wait()
        return self.state

    async def watch(self) -> AsyncIterator[State]:
        """The state now and after each change, until the job has ended."""
        state = None
        while state is None or not state.ended:
            state = await self.after(state)
            yield state

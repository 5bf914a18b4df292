"""How far a job is, for whoever watches it: only the newest state is kept, and it never goes backwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from service.engine.events import Previewed

Stage = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class State:
    """One moment of a job. position: from 1, in the queue; estimate: seconds until it ends, if known.

    step of steps: of all its images together; preview: the newest there is.
    """

    stage: Stage = "queued"
    position: int | None = None
    estimate: float | None = None
    step: int = 0
    steps: int = 0
    preview: Previewed | None = None

    @property
    def ended(self) -> bool:
        return self.stage not in ("queued", "running")


class Progress:
    """The newest state of one job. A slow watcher skips states; a job that runs again repeats none."""

    def __init__(self) -> None:
        self.state = State()
        self._news = asyncio.Event()
        self._previewed: dict[int, int] = {}  # image -> step of its newest preview

    def wait_at(self, position: int, estimate: float | None) -> None:
        """It waits; one that began once, before its worker died, is not shown to wait again."""
        if self.state.stage == "queued":
            self._change(position=position, estimate=estimate)

    def start(self, steps: int) -> None:
        """Its first step is about to run."""
        if self.state.stage == "queued":
            self._change(stage="running", position=None, estimate=None, steps=steps)

    def advance(self, step: int) -> None:
        """So many steps are done."""
        if self.state.stage == "running" and step > self.state.step:
            self._change(step=step)

    def show(self, preview: Previewed) -> None:
        """A preview has come."""
        if self.state.stage == "running" and preview.step > self._previewed.get(preview.index, 0):
            self._previewed[preview.index] = preview.step
            self._change(preview=preview)

    def end(self, stage: Stage) -> None:
        """It is over; the first end is the one that counts."""
        if not self.state.ended:
            self._change(stage=stage, position=None, estimate=None, preview=None)

    def _change(self, **changes: Any) -> None:
        state = replace(self.state, **changes)
        if state != self.state:
            self.state = state
            self._news.set()
            self._news = asyncio.Event()

    async def after(self, seen: State | None) -> State:
        """The newest state, as soon as it is another one than `seen`."""
        while self.state is seen:
            await self._news.wait()
        return self.state

    async def watch(self) -> AsyncIterator[State]:
        """The state now and whenever it has changed, to the end."""
        state = None
        while state is None or not state.ended:
            state = await self.after(state)
            yield state

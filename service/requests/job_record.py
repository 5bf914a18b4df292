"""One job as its clients see it: its state, its events and its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from service.errors import ServiceError, to_body
from service.keys.client import Client
from service.requests import response
from service.requests.job_schemas import JobPreview, JobStatus, Task
from service.requests.resolved_request import ResolvedRequest
from service.requests.response import Answer
from service.requests.response_schemas import ErrorDetail
from service.requests.webhooks.deliveries import Delivery
from service.worker.progress import Progress, Stage, State

KEEP_ALIVE_SECONDS = (
    15.0  # without an event, after which a stream sends a comment: proxies close idle connections
)


class JobEvent(NamedTuple):
    """An event of a job's stream. number: of the job's state; never smaller than that of an earlier event."""

    number: int
    name: str
    data: JobStatus | JobPreview


class JobView(Protocol):
    """A job as its clients see it, in this process or in another one."""

    @property
    def id(self) -> str: ...

    async def describe(self) -> JobStatus:
        """The newest state of the job; once it is done, with the images."""

    def events(self, seen: int | None = None) -> AsyncIterator[JobEvent | None]:
        """As Record.events()."""

    async def cancel(self) -> None:
        """Cancel the job, queued or running; a job that has ended stays as it is."""


@dataclass(eq=False)
class Record:
    """One job.

    resolved: without its input images; client: whose it is; work: the task that returns the answer.
    """

    resolved: ResolvedRequest
    task: Task
    client: Client
    request_id: str
    progress: Progress
    work: asyncio.Task[Answer]
    kept: bool = False  # the job can be found for a while after its end
    key: Hashable = None  # idempotency key; see submit()
    delivery: Delivery | None = None  # of its webhook
    awaited: bool = False  # run() raises the job's error, and its caller counts it
    created: float = field(default_factory=time.time)
    fetched: bool = False  # a client has read the final state

    @property
    def id(self) -> str:
        return self.resolved.id

    @property
    def status(self) -> Stage:
        """The job's stage. It is running until its files are encoded, which is later than in the worker."""
        return self._stage_at(self.progress.state)

    def _stage_at(self, state: State) -> Stage:
        """The stage that clients see: that of `state`, or, after the end of the job, how it ended."""
        if self.work.cancelled():
            return "cancelled"
        if self.work.done():
            return "failed" if self.work.exception() else "done"
        return "queued" if state.stage == "queued" else "running"

    @property
    def bytes(self) -> int:
        """The size of the job's files; 0 before they are encoded."""
        return sum(map(len, self.work.result().files)) if self.status == "done" else 0

    @property
    def error(self) -> ServiceError | None:
        """The error that the job failed with, if it did."""
        error = self.work.exception() if self.status == "failed" else None
        return error if error is None or isinstance(error, ServiceError) else ServiceError()

    async def cancel(self) -> None:
        """Cancel the job, queued or running; a job that has ended stays as it is."""
        self.work.cancel()
        await asyncio.wait({self.work})

    @property
    def collected(self) -> bool:
        """Whether a client has the final state, fetched or by its webhook with all images."""
        return self.fetched or bool(self.delivery and self.delivery.sent_all)

    async def describe(self, state: State | None = None) -> JobStatus:
        """The newest state of the job, or an earlier one; once it is done, with the images."""
        self.fetched = self.fetched or self.work.done()
        return await self.snapshot(state)

    async def snapshot(self, state: State | None = None) -> JobStatus:
        """As describe(), but not for a client that fetches the job."""
        state = state or self.progress.state
        status = self._stage_at(state)
        return JobStatus(
            id=self.id,
            task=self.task,
            status=status,
            created=int(self.created),
            position=state.position,
            estimate=state.estimate,
            step=state.step,
            steps=state.steps,
            result=await self.work.result().as_json() if status == "done" else None,
            error=ErrorDetail(**to_body(self.error, self.request_id)["error"]) if self.error else None,
            webhook=self.delivery.describe() if self.delivery else None,
        )

    async def events(self, seen: int | None = None) -> AsyncIterator[JobEvent | None]:
        """The events from the current state to the end; None after a while of silence.

        seen: number of the last event that the reader received; the current state is left out if it is that.
        """
        current = self.progress.state
        shown = current if current.number == seen else None
        async for state in self._states(shown):
            if state is None:
                yield None
                continue
            if state.preview and (shown is None or state.preview is not shown.preview):
                preview = await asyncio.to_thread(response.to_job_preview, self.resolved, state.preview)
                yield JobEvent(state.number, "preview", preview)
            changed = shown is None or replace(state, preview=shown.preview) != shown
            if changed and not self.work.done():  # otherwise the final event follows below
                name = "step" if self._stage_at(state) == "running" else "queued"
                yield JobEvent(state.number, name, await self.describe(state))
            shown = state
        await asyncio.wait({self.work})
        yield JobEvent(self.progress.state.number, self.status, await self.describe())

    async def _states(self, state: State | None) -> AsyncIterator[State | None]:
        """The states after `state` to the end, with None after each KEEP_ALIVE_SECONDS of silence."""
        while state is None or not state.ended:
            try:
                state = await asyncio.wait_for(self.progress.after(state), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield None
            else:
                yield state

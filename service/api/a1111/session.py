"""The state that clients of A1111's API read: the selected model and file format, and the requests.

A1111 has one model at a time and runs one request at a time, and its clients read the state of both. Here
"the model" is the one for requests that name no model, and "the request" is the oldest unfinished one. Each
API key has a state of its own; with an admin key, "the request" is the oldest one of all keys.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.spec import ModelSpec
from service.api.a1111 import options
from service.api.a1111.names import plain_names
from service.api.a1111.schemas import Options, ProgressResponse, ProgressState
from service.errors import NotFound
from service.keys.quotas import Caller
from service.requests import response
from service.requests.background import Jobs, Submission
from service.requests.checks import supports_any
from service.requests.defaults import coalesce
from service.requests.job_record import Record
from service.requests.resolve import TASKS_OF
from service.requests.response import Answer
from service.requests.schemas import GenerateRequest, InpaintRequest

NO_IMAGES = "The request was interrupted before its first step: there are no images."


@dataclass
class Choice:
    """What a client has chosen for later requests. format: of images in responses, by A1111's name."""

    format: str = "png"
    checkpoint: str | None = None


class A1111Sessions:
    """The choices of all clients, and the unfinished requests of this API.

    running: the oldest first; interrupted: ids of running requests.
    """

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.running: dict[str, Record] = {}
        self.interrupted: set[str] = set()
        self._choices: defaultdict[str, Choice] = defaultdict(Choice)

    def of(self, caller: Caller) -> A1111Session:
        """What a request's client sees and may change."""
        return A1111Session(self, caller, self._choices[caller.client.id])


class A1111Session:
    """The selected model, the file format and the unfinished requests of a client."""

    def __init__(self, sessions: A1111Sessions, caller: Caller, choice: Choice) -> None:
        self.jobs = sessions.jobs
        self.choice = choice
        self._caller = caller
        self._running = sessions.running
        self._interrupted = sessions.interrupted

    @property
    def format(self) -> str:
        return self.choice.format

    @property
    def specs(self) -> Mapping[str, ModelSpec]:
        """The models that generate images, so without upscalers. Raises the errors of check_open()."""
        self.jobs.supervisor.check_open()
        return {name: spec for name, spec in self.jobs.supervisor.specs.items() if makes_images(spec)}

    @property
    def checkpoint(self) -> str | None:
        """The model for requests that name no model; None: the first one that supports the task.

        A selected model that is not served any more counts as none.
        """
        chosen = self.choice.checkpoint
        return chosen if chosen in self.specs else None

    def find(self, name: str, param: str) -> str:
        """The model for A1111's name of a checkpoint: NAME, NAME [hash] or NAME.safetensors.

        Raises NotFound, naming `param`.
        """
        specs = self.specs
        if found := next((candidate for candidate in plain_names(name) if candidate in specs), None):
            return found
        raise NotFound(f"{param} must be one of {', '.join(specs)}", param=param)

    def choose(self, name: str, param: str = options.CHECKPOINT) -> None:
        """Select the model for requests that name no model. Raises NotFound."""
        self.choice.checkpoint = self.find(name, param)

    async def set_loaded(self, load: bool) -> None:
        """Load the selected model, or unload it. Raises as Backend.set_loaded() does."""
        await self.jobs.supervisor.set_loaded(self.options().sd_model_checkpoint, load)

    def options(self) -> Options:
        checkpoint = self.checkpoint or next(iter(self.specs), "")
        return Options(sd_model_checkpoint=checkpoint, samples_format=self.format, **options.defaults())

    async def run(self, prepare: Callable[[], Submission]) -> Answer:
        """Run a job as Jobs.run() does, visible to progress() and interrupt().

        If it is interrupted before its first step, the answer has no images.
        """
        record = await self.jobs.start(prepare, self._caller)
        record.awaited = True
        self._running[record.id] = record
        try:
            await asyncio.wait({record.work})
            if record.work.cancelled():
                warnings = (*record.resolved.warnings, NO_IMAGES)
                return Answer(record.resolved, (), warnings, {}, int(time.time()))
            return record.work.result()
        finally:
            del self._running[record.id]
            self._interrupted.discard(record.id)
            record.work.cancel()

    def _visible(self) -> list[Record]:
        """The unfinished requests that the client may see, the oldest first."""
        client = self._caller.client
        return [record for record in self._running.values() if client.may_see(record.client.id)]

    def _oldest(self) -> Record | None:
        return next(iter(self._visible()), None)

    def interrupt(self) -> None:
        """End the oldest request, with its images as they are."""
        record = self._oldest()
        if record is None:
            return
        self._interrupted.add(record.id)
        if record.task == "upscale" or record.progress.state.stage == "queued":
            record.work.cancel()
        else:
            self.jobs.supervisor.interrupt(record.id)

    async def progress(self, with_image: bool) -> ProgressResponse:
        """The progress of the oldest request; all zeros if there is none."""
        record = self._oldest()
        if record is None:
            none = ProgressState(job="", job_count=0, job_timestamp="0", sampling_step=0, sampling_steps=0)
            return ProgressResponse(progress=0.0, eta_relative=0.0, state=none)
        state, image = record.progress.state, None
        if with_image and state.preview:
            image = (await asyncio.to_thread(response.to_job_preview, record.resolved, state.preview)).data
        done = state.step / state.steps if state.steps else 0.0
        left = (time.time() - record.created) * (1 / done - 1) if done else coalesce(state.estimate, 0.0)
        counters = ProgressState(
            interrupted=record.id in self._interrupted,
            job=record.id,
            job_count=len(self._visible()),
            job_timestamp=timestamp(record.created),
            sampling_step=state.step,
            sampling_steps=state.steps,
        )
        return ProgressResponse(progress=done, eta_relative=left, state=counters, current_image=image)


def makes_images(spec: ModelSpec) -> bool:
    return supports_any(spec, (*TASKS_OF[GenerateRequest], *TASKS_OF[InpaintRequest]))


def timestamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))

"""A supervisor without a worker process, and a fake worker that sends it messages."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from service.engine.events import JobSteps, Previewed, Started, Stepped
from service.metrics import Metrics
from service.settings import Settings
from service.worker.child import WorkerProcess
from service.worker.protocol import Report
from service.worker.supervisor import Supervisor


def supervisor(specs: bool = True, **settings) -> Supervisor:
    """A supervisor without a worker. specs: whether it knows a model, as after a worker was ready."""
    made = Supervisor(Settings(**settings), Metrics())
    made.specs = {"m": object()} if specs else {}
    return made


def run(scenario: Coroutine) -> None:
    """Run a coroutine; fail after two minutes."""
    asyncio.run(asyncio.wait_for(scenario, 120))


class Worker:
    """A fake worker: sends the supervisor messages about one job."""

    def __init__(self, service: Supervisor, job: str = "a") -> None:
        self.service = service
        self.process = WorkerProcess(None, None, None)
        self.job = job

    def say(self, report: Report) -> None:
        self.service._handle(self.process, report)

    def start(self, steps: int) -> None:
        self.say(Started(self.job, steps))

    def step(self, done: int) -> None:
        jobs = (JobSteps(self.job, done, 1),)
        self.say(Stepped(rows=2, padded=2, images=1, seconds=0.1, running=1, waiting=0, jobs=jobs))

    def preview(self, step: int) -> None:
        self.say(Previewed(self.job, index=0, step=step, width=1, height=1, pixels=b"rgb"))

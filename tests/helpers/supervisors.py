"""A supervisor without a worker process, and a fake worker that sends it messages."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace

from service.engine.events import JobSteps, Previewed, Started, Stepped
from service.engine.job import ModelKey
from service.keys.client import ANYBODY, Client
from service.keys.quotas import Caller
from service.metrics import Metrics
from service.settings import Settings
from service.worker.child import WorkerProcess
from service.worker.protocol import Command, Offer, Ready, Report
from service.worker.supervisor import Supervisor
from tests.checkpoints.tiny import tiny_spec


def supervisor(specs: bool = True, **settings) -> Supervisor:
    """A supervisor without a worker. specs: whether it knows a model, as after a worker was ready."""
    made = Supervisor(Settings(**settings), Metrics())
    made.models.specs, made.models.known = {"m": object()} if specs else {}, specs
    return made


def caller(name: str = "", **fields) -> Caller:
    """A request of a client with this name, or of a client without a key."""
    client = Client(f"key {name}", name, **fields) if name else ANYBODY
    return Caller(client, "r")


def run(scenario: Coroutine) -> None:
    """Run a coroutine; fail after two minutes."""
    asyncio.run(asyncio.wait_for(scenario, 120))


class Worker:
    """A fake worker of a replica: sends the supervisor messages about one job.

    sent: the commands that it received.
    """

    def __init__(self, service: Supervisor, job: str = "a", replica: int = 0) -> None:
        self.replica = service.replicas[replica]
        self.job = job
        self.sent: list[Command] = []
        self.replica.worker = self.process = WorkerProcess(None, None, None)
        self.process.send = self.sent.append

    def say(self, report: Report) -> None:
        self.replica.receive(report)

    def become_ready(self, *names: str) -> None:
        """The worker is ready, with these models loaded."""
        specs = tuple(replace(tiny_spec(), name=name) for name in names)
        self.say(Offer(0, specs, ()))
        self.say(Ready(tuple(map(ModelKey, names)), "cpu", 9, (("imports", 0.5),)))

    def start(self, steps: int) -> None:
        self.say(Started(self.job, steps))

    def step(self, done: int) -> None:
        jobs = (JobSteps(self.job, done, 1),)
        self.say(Stepped(rows=2, padded=2, images=1, seconds=0.1, running=1, waiting=0, jobs=jobs))

    def preview(self, step: int) -> None:
        self.say(Previewed(self.job, index=0, step=step, width=1, height=1, pixels=b"rgb"))

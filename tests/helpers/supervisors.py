"""A supervisor whose worker is played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from service.metrics import Metrics
from service.settings import Settings
from service.worker.supervisor import Life, Supervisor


def supervisor(specs: bool = True, **settings) -> Supervisor:
    """A supervisor without a worker. specs: as if a worker had been ready before."""
    made = Supervisor(Settings(**settings), Metrics())
    made.specs = {"m": object()} if specs else {}
    return made


def run(scenario: Coroutine) -> None:
    """Run a scenario to its end; fail after two minutes."""
    asyncio.run(asyncio.wait_for(scenario, 120))


class Worker:
    """Sends a supervisor the messages that a worker sends about one job."""

    def __init__(self, service: Supervisor, job: str = "a") -> None:
        self.service = service
        self.life = Life(None, None, None)
        self.job = job

    def say(self, kind: str, blobs: tuple[bytes, ...] = (), **header) -> None:
        self.service._take(self.life, kind, header, blobs)

    def step(self, done: int) -> None:
        counts = {"rows": 2, "padded": 2, "images": 1, "seconds": 0.1, "running": 1, "waiting": 0}
        self.say("Stepped", jobs=[[self.job, done]], **counts)

    def preview(self, step: int) -> None:
        self.say("Previewed", (b"rgb",), job=self.job, index=0, step=step, width=1, height=1)

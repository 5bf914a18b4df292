"""The in-process baseline: the same requests in this process, without HTTP, worker and image files."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from service.bench.mix import Request
from service.catalogue import Folders
from service.device.loading import build  # imports torch, which the other modules of the benchmark do not
from service.engine.engine import Engine
from service.engine.events import Done, Event
from service.engine.job import Job
from service.requests.resolve import resolve
from service.requests.schemas import GenerateRequest, InpaintRequest
from service.settings import Settings

BODIES = {"/generate": GenerateRequest, "/inpaint": InpaintRequest}


class InProcessBaseline:
    """A model in this process, which runs requests and counts its images."""

    def __init__(self, settings: Settings) -> None:
        runner = build(settings, Folders(settings).models)
        self.settings, self.specs = settings, runner.specs
        self.engine = Engine(runner, self.emit, settings.max_rows, settings.decode_chunk, time.monotonic)
        self.images = 0

    def emit(self, event: Event) -> None:
        self.images += len(event.images) if isinstance(event, Done) else 0

    def images_per_second(self, requests: Sequence[Request], due: Sequence[float], clients: int) -> float:
        """Run the requests, each at its due time or later, at most `clients` at the same time."""
        waiting = deque(zip(due, [self.job(request) for request in requests], strict=True))
        self.images, begin = 0, time.monotonic()
        while waiting or self.engine.busy:
            now = time.monotonic() - begin
            while waiting and waiting[0][0] <= now and len(self.engine.jobs) < clients:
                self.engine.submit(waiting.popleft()[1])
            if self.engine.busy:
                self.engine.tick()
            elif waiting:
                time.sleep(waiting[0][0] - now)
        return self.images / (time.monotonic() - begin)

    def job(self, request: Request) -> Job:
        return resolve(BODIES[request.path](**request.body), self.specs, self.settings).to_job()

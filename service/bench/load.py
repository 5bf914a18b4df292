"""Sends requests, closed loop or open, and watches /metrics while they run."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import httpx
from tqdm import tqdm

from service.bench.mix import Request

POLL_SECONDS = 0.2  # between two looks at /metrics; each costs the server about a millisecond
PAUSE_SECONDS = 1.0  # of a client that was refused, so that it does not spin
NO_ANSWER = "no answer"


@dataclass(frozen=True)
class Answer:
    """What came of a request; sent and ended in seconds since the load began, queue and denoise its parts."""

    request: Request
    sent: float  # open loop: when it was due, so that a late sender counts against the service
    ended: float
    status: str  # "200", "429", ..., or NO_ANSWER
    queue: float = 0.0
    denoise: float = 0.0

    @property
    def images(self) -> int:
        return self.request.body["n"] if self.status == "200" else 0

    @property
    def latency(self) -> float:
        return self.ended - self.sent


class Sample(NamedTuple):
    """The values of /metrics without labels, so many seconds after the load began."""

    at: float
    values: dict[str, float]

    def since(self, before: Sample, name: str) -> float:
        """By how much a value grew."""
        return self.values.get(name, 0.0) - before.values.get(name, 0.0)

    def rows_per_call(self, before: Sample) -> float:
        """Mean of the UNet calls since then, padding left out; 0 if there were none."""
        calls = self.since(before, "ldm_unet_rows_count")
        return self.since(before, "ldm_unet_rows_sum") / calls if calls else 0.0

    @property
    def jobs(self) -> float:
        """Accepted and not answered."""
        return self.values.get("ldm_jobs_running", 0.0) + self.values.get("ldm_jobs_waiting", 0.0)


class Interval(NamedTuple):
    """From one look at /metrics to a later one, and the mean rows of the UNet calls that ended meanwhile."""

    begin: float
    end: float
    rows: float


def intervals(samples: Sequence[Sample]) -> Iterator[Interval]:
    """Without the looks at which a call was still under way; where there was nothing to do, 0 rows."""
    before = samples[0]
    for after in samples[1:]:
        if after.rows_per_call(before) or not after.jobs:
            yield Interval(before.at, after.at, after.rows_per_call(before))
            before = after


@dataclass
class Run:
    """A load, and what is seen of it. seconds: from the first request to the last answer."""

    client: httpx.AsyncClient
    bar: tqdm[NoReturn]
    begin: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def now(self) -> float:
        return time.monotonic() - self.begin

    async def ask(self, request: Request, due: float | None = None) -> Answer:
        """Send one, wait for its answer and keep that."""
        sent = self.now() if due is None else due
        try:
            response = await self.client.post(request.path, json=request.body)
            answer = to_answer(request, sent, self.now(), response)
        except httpx.TransportError:
            answer = Answer(request, sent, self.now(), NO_ANSWER)
        self.answers.append(answer)
        self.bar.update()
        return answer

    async def look(self) -> None:
        """Keep what /metrics says, and show it."""
        with suppress(httpx.TransportError):  # a lost request is counted, a lost look is not missed
            text = (await self.client.get("/metrics")).text
            self.samples.append(Sample(self.now(), read_metrics(text)))
            self.bar.set_postfix_str(self.live())

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.look()

    def live(self) -> str:
        """The state in a few words."""
        values = self.samples[-1].values
        rows = ([0.0] + [interval.rows for interval in intervals(self.samples)])[-1]
        images = sum(answer.images for answer in self.answers)
        failed = sum(answer.status != "200" for answer in self.answers)
        jobs = (f"{values.get(f'ldm_jobs_{kind}', 0):.0f} {kind}" for kind in ("running", "waiting"))
        speed = f"{images / self.now():.2f} images/s, {rows:.1f} rows a call"
        return f"{speed}, {', '.join(jobs)}, {failed} failed"


def to_answer(request: Request, sent: float, ended: float, response: httpx.Response) -> Answer:
    if response.status_code != 200:
        return Answer(request, sent, ended, str(response.status_code))
    timings = response.json()["timings"]
    return Answer(request, sent, ended, "200", timings["queue"], timings["denoise"])


def read_metrics(text: str) -> dict[str, float]:
    """Name -> value of the lines without labels."""
    pairs = (line.split() for line in text.splitlines() if line.startswith("ldm_") and "{" not in line)
    return {name: float(value) for name, value, *_ in pairs}


Traffic = Callable[[Run], Awaitable[None]]


def closed(requests: Iterator[Request], clients: int, seconds: float) -> Traffic:
    """So many clients, each sending its next request when the last one is answered."""

    async def client(run: Run) -> None:
        for request in requests:  # shared: each takes the next one
            answer = await run.ask(request)
            if answer.status != "200":
                await asyncio.sleep(PAUSE_SECONDS)
            if run.now() >= seconds:
                return

    async def traffic(run: Run) -> None:
        await asyncio.gather(*(client(run) for _ in range(clients)))

    return traffic


def opened(requests: Iterable[Request], due: Iterable[float], seconds: float) -> Traffic:
    """Each request at its time, whatever became of the others."""

    async def traffic(run: Run) -> None:
        async with asyncio.TaskGroup() as group:
            for request, at in zip(requests, due, strict=False):
                if at >= seconds:
                    return
                await asyncio.sleep(at - run.now())
                group.create_task(run.ask(request, at))

    return traffic


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Poisson: seconds from the beginning."""
    chance, at = random.Random(seed), 0.0
    while True:
        at += chance.expovariate(rate)
        yield at


async def measure(client: httpx.AsyncClient, name: str, total: int | None, traffic: Traffic) -> Run:
    """Run some traffic, with looks at /metrics before, during and after."""
    with tqdm(total=total, unit="request", desc=name, dynamic_ncols=True) as bar:
        run = Run(client, bar)
        await run.look()
        watch = asyncio.create_task(run.watch())
        run.begin = time.monotonic()
        try:
            await traffic(run)
        finally:
            watch.cancel()
        run.seconds = run.now()
        await run.look()
    return run

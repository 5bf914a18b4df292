"""Sends requests, in a closed or an open loop, and samples /metrics while they run."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import httpx
from tqdm import tqdm

from service.bench.mix import Request

SAMPLE = re.compile(r"^(ldm_\w+)(\{.*\})? (\S+)$", re.MULTILINE)  # a line of /metrics: name, labels, value
POLL_SECONDS = 0.5  # between two samples of /metrics; each takes the server 3 ms of CPU time
PAUSE_SECONDS = 1.0  # between an error and a client's next request, so that it does not flood the server
NO_ANSWER = "no answer"


@dataclass(frozen=True)
class Answer:
    """The result of a request.

    `sent` and `ended`: seconds since the start of the run; `queue` and `denoise`: the response's timings.
    """

    request: Request
    sent: float  # in an open loop the due time, so that time lost before sending counts as latency
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
    """The values of /metrics, summed over labels, `at` seconds after the start of the run."""

    at: float
    values: dict[str, float]

    def since(self, before: Sample, name: str) -> float:
        """The increase of a value since an earlier sample."""
        return self.values.get(name, 0.0) - before.values.get(name, 0.0)

    def rows_per_call(self, before: Sample) -> float:
        """Mean rows, without padding, of the UNet calls since an earlier sample; 0 without calls."""
        calls = self.since(before, "ldm_unet_rows_count")
        return self.since(before, "ldm_unet_rows_sum") / calls if calls else 0.0

    @property
    def jobs(self) -> float:
        """Jobs accepted and not yet answered."""
        return self.values.get("ldm_jobs_running", 0.0) + self.values.get("ldm_jobs_waiting", 0.0)


class Interval(NamedTuple):
    """From one sample of /metrics to a later one, with the mean rows of the UNet calls that ended between."""

    begin: float
    end: float
    rows: float


def intervals(samples: Sequence[Sample]) -> Iterator[Interval]:
    """The intervals between samples; samples during a UNet call are skipped. Without work, rows is 0."""
    before = samples[0]
    for after in samples[1:]:
        if after.rows_per_call(before) or not after.jobs:
            yield Interval(before.at, after.at, after.rows_per_call(before))
            before = after


@dataclass
class Run:
    """A run and its results. seconds: from the first request to the last response."""

    client: httpx.AsyncClient
    bar: tqdm[NoReturn]
    begin: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def now(self) -> float:
        return time.monotonic() - self.begin

    async def send(self, request: Request, due: float | None = None) -> Answer:
        """Send a request, wait for its response, and record it."""
        sent = self.now() if due is None else due
        try:
            response = await self.client.post(request.path, json=request.body)
            answer = to_answer(request, sent, self.now(), response)
        except httpx.TransportError:
            answer = Answer(request, sent, self.now(), NO_ANSWER)
        self.answers.append(answer)
        self.bar.update()
        return answer

    async def sample(self) -> None:
        """Record a sample of /metrics, and update the progress bar."""
        with suppress(httpx.TransportError):  # a sample may be missing
            text = (await self.client.get("/metrics")).text
            self.samples.append(Sample(self.now(), read_metrics(text)))
            self.bar.set_postfix_str(self.live())

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.sample()

    def live(self) -> str:
        """The current state, for the progress bar."""
        values = self.samples[-1].values
        rows = ([0.0] + [interval.rows for interval in intervals(self.samples)])[-1]
        images = sum(answer.images for answer in self.answers)
        failed = sum(answer.status != "200" for answer in self.answers)
        jobs = (f"{values.get(f'ldm_jobs_{kind}', 0):.0f} {kind}" for kind in ("running", "waiting"))
        speed = f"{images / self.now():.2f} images/s, {rows:.1f} rows per call"
        return f"{speed}, {', '.join(jobs)}, {failed} failed"


def to_answer(request: Request, sent: float, ended: float, response: httpx.Response) -> Answer:
    if response.status_code != 200:
        return Answer(request, sent, ended, str(response.status_code))
    timings = response.json()["timings"]
    return Answer(request, sent, ended, "200", timings["queue"], timings["denoise"])


def read_metrics(text: str) -> dict[str, float]:
    """Name -> value, summed over labels. Buckets of histograms are left out."""
    values: defaultdict[str, float] = defaultdict(float)
    for name, _, value in SAMPLE.findall(text):
        if not name.endswith("_bucket"):
            values[name] += float(value)
    return dict(values)


Traffic = Callable[[Run], Awaitable[None]]


def closed(requests: Iterator[Request], clients: int, seconds: float) -> Traffic:
    """Closed loop: each client sends its next request after the response to its last one."""

    async def client(run: Run) -> None:
        for request in requests:  # the iterator is shared by all clients
            answer = await run.send(request)
            if answer.status != "200":
                await asyncio.sleep(PAUSE_SECONDS)
            if run.now() >= seconds:
                return

    async def traffic(run: Run) -> None:
        await asyncio.gather(*(client(run) for _ in range(clients)))

    return traffic


def opened(requests: Iterable[Request], due: Iterable[float], seconds: float) -> Traffic:
    """Open loop: each request is sent at its due time, whether or not earlier ones were answered."""

    async def traffic(run: Run) -> None:
        async with asyncio.TaskGroup() as group:
            for request, at in zip(requests, due, strict=False):
                if at >= seconds:
                    return
                await asyncio.sleep(at - run.now())
                group.create_task(run.send(request, at))

    return traffic


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Due times of a Poisson process, in seconds."""
    chance, at = random.Random(seed), 0.0
    while True:
        at += chance.expovariate(rate)
        yield at


async def measure(client: httpx.AsyncClient, name: str, total: int | None, traffic: Traffic) -> Run:
    """Run the traffic and sample /metrics before, during and after it."""
    with tqdm(total=total, unit="request", desc=name, dynamic_ncols=True) as bar:
        run = Run(client, bar)
        await run.sample()
        watch = asyncio.create_task(run.watch())
        run.begin = time.monotonic()
        try:
            await traffic(run)
        finally:
            watch.cancel()
        run.seconds = run.now()
        await run.sample()
    return run

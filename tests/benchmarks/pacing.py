"""The engine on a simulated GPU: python -m tests.benchmarks.pacing

Nothing runs on a device. A UNet call takes fixed + rows * row seconds of the device's time, and is reported
with the next call, as on CUDA. The first call of a size is slow, and so is the call that is recorded as a
graph. The times are estimates for an H200, not measurements.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from models.sampling.guidance import row_count
from service.device.graphs import RECORD_AT
from service.engine.engine import Engine
from service.engine.events import Done, Stepped
from service.engine.job import ImageKey, Job, ModelKey, Segment, Shape
from service.engine.row_limits import MemoryUse
from service.engine.runner import Call, DecodedImage, Preview, padded_size
from service.setting_values import DEFAULT_BUCKETS

CLIENTS = 16
COARSE_BUCKETS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Costs:
    """Seconds. fixed, row: of a UNet call; decode: of an image; first, record: that the first call of a size
    and the recorded one take more; launch, start, copy: of the CPU, of a call, a job's start and an image."""

    fixed: float
    row: float
    decode: float
    first: float = 0.0
    record: float = 0.0
    launch: float = 0.0012
    start: float = 0.004
    copy: float = 0.002


MODELS = {
    "Stable Diffusion 1.5, 512": Costs(0.0045, 0.00199, 0.009),
    "LDM text, 256": Costs(0.0040, 0.00045, 0.0035),
    "SDXL, 1024": Costs(0.006, 0.0142, 0.050),
}


class SimulatedGpu:
    """A runner whose device and CPU have their own times."""

    def __init__(self, costs: Costs, buckets: Sequence[int]) -> None:
        self.costs, self.buckets = costs, tuple(buckets)
        self.now = 0.0  # of the CPU
        self.free_at = 0.0  # when the device will have done all that is queued
        self.last: tuple[float, float] | None = None  # begin and end of the last UNet call
        self.calls: Counter[int] = Counter()  # by number of rows
        self.jobs: dict[str, Job] = {}
        self.decoding: list[tuple[ImageKey, float]] = []  # and the time at which each will have been decoded
        self.decode_batch = 4
        self.measured = 0  # rows of the largest call so far

    def clock(self) -> float:
        return self.now

    def shape(self, job: Job, full_precision: bool = False) -> Shape:
        return Shape((Segment("group", row_count(job.guidance_scale), job.steps, 1.0),))

    def load(self, job: Job, busy: Collection[ModelKey]) -> bool:
        return True

    def make_room(self, busy: Collection[ModelKey]) -> None:
        pass

    def start(self, job: Job, full_precision: bool = False) -> tuple[str, ...]:
        self.jobs[job.id] = job
        self.now += self.costs.start
        self._wait()
        return ()

    def step(self, keys: Sequence[ImageKey]) -> Call:
        rows = sum(row_count(self.jobs[key.job].guidance_scale) for key in keys)
        size = padded_size(rows, self.buckets)
        self.calls[size] += 1
        extra = {1: self.costs.first, RECORD_AT: self.costs.record}.get(self.calls[size], 0.0)
        self.now += self.costs.launch
        begin = max(self.now, self.free_at)
        self.now += extra
        self.free_at = begin + extra + self.costs.fixed + size * self.costs.row
        before, self.last = self.last, (begin, self.free_at)
        if before:
            self.now = max(self.now, before[1])
        memory = MemoryUse(size, size, 10**6) if size > self.measured else None
        self.measured = max(self.measured, size)
        return Call(size, (), memory, True, before and before[1] - before[0], slow=extra > 0)

    def settle(self) -> tuple[str, ...]:
        self._wait()
        return ()

    def preview(self, key: ImageKey) -> Preview:
        return Preview(1, 1, b"abc")

    def decode(self, keys: Sequence[ImageKey]) -> None:
        for key in keys:
            self.free_at = max(self.now, self.free_at) + self.costs.decode
            self.decoding.append((key, self.free_at))

    def decoded(self, wait: bool) -> list[DecodedImage]:
        ended = [(key, end) for key, end in self.decoding if wait or end <= self.now]
        for key, end in ended:
            self.now = max(self.now, end) + self.costs.copy
            self.decoding.remove((key, end))
        return [DecodedImage(key, b"", self.costs.decode) for key, _ in ended]

    def discard(self, job: str) -> None:
        self.jobs.pop(job, None)

    def _wait(self) -> None:
        self.now = max(self.now, self.free_at)


@dataclass(frozen=True)
class Outcome:
    seconds: float
    calls: tuple[int, ...]  # rows of each UNet call, padding included
    used: float  # share of these rows that belong to images


def make_job(number: int, steps: int, guided: bool = True) -> Job:
    scale = 5.0 if guided else 1.0
    return Job(str(number), "m", "p", "", 512, 512, steps, scale, 0, 1, "ddim", 0.0)


def mixed_jobs(count: int) -> list[Job]:
    """Jobs of 10 to 50 steps; one in four without guidance."""
    draw = random.Random(0)
    return [make_job(number, draw.randint(10, 50), bool(number % 4)) for number in range(count)]


def simulate(costs: Costs, buckets: Sequence[int], jobs: Sequence[Job], clients: int) -> Outcome:
    """All jobs, at most `clients` of them at a time."""
    gpu = SimulatedGpu(costs, buckets)
    steps: list[Stepped] = []
    done: list[Done] = []

    def record(event: object) -> None:
        if isinstance(event, Stepped):
            steps.append(event)
        elif isinstance(event, Done):
            done.append(event)

    engine = Engine(gpu, record, gpu.buckets[-1], 4, gpu.clock)
    waiting = list(reversed(jobs))
    while waiting or engine.busy:
        while waiting and len(engine.jobs) < clients:
            engine.submit(waiting.pop())
        engine.tick()
    assert len(done) == len(jobs)
    calls = tuple(step.padded for step in steps)
    return Outcome(gpu.now, calls, sum(step.rows for step in steps) / sum(calls))


def speedup(costs: Costs, buckets: Sequence[int]) -> tuple[float, float]:
    """How many times faster a mixed load is with many clients than one at a time; the share of rows used."""
    jobs = mixed_jobs(64)
    many = simulate(costs, buckets, jobs, CLIENTS)
    return simulate(costs, buckets, jobs, 1).seconds / many.seconds, many.used


def main() -> None:
    print(f"mixed load, {CLIENTS} clients against one at a time")
    for name, costs in MODELS.items():
        for buckets in (COARSE_BUCKETS, DEFAULT_BUCKETS):
            ratio, used = speedup(costs, buckets)
            print(f"  {name:26} {len(buckets):2} buckets: {ratio:.2f} times, {used:.0%} of the rows used")
    print("cold start, 16 jobs of 50 steps, Stable Diffusion 1.5")
    for first, record in ((0.0, 0.0), (2.0, 0.6), (5.0, 1.5)):
        costs = Costs(0.0045, 0.00199, 0.009, first, record)
        outcome = simulate(costs, DEFAULT_BUCKETS, [make_job(number, 50) for number in range(16)], 16)
        print(f"  first call {first} s, recorded call {record} s: {outcome.seconds:.1f} s")


if __name__ == "__main__":
    main()

"""The scheduler against other ways to share a device, in simulated time: python -m tests.benchmarks.policies

Nothing runs on a device here: a UNet call takes `fixed + rows * row` seconds, decoding one image `decode`.
Load is a share of what the device could do if every call were full. All policies get the same requests.
Fairness is Jain's index of the slowdowns (latency / latency on an idle device): 1 if all are equal.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import timeit
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from service.engine.job import ImageKey, Segment, Shape
from service.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Size:
    """row: seconds of one row of a call; decode: seconds of decoding an image; part: share of requests."""

    row: float
    decode: float
    part: float


@dataclass(frozen=True)
class Device:
    """A cost model. fixed: seconds of a UNet call without its rows."""

    fixed: float
    max_rows: int
    decode_chunk: int
    sizes: dict[int, Size]

    def call(self, size: int, rows: float) -> float:
        """Seconds of a UNet call."""
        return self.fixed + rows * self.sizes[size].row


DEVICES = {
    "gpu": Device(
        fixed=0.005,
        max_rows=32,
        decode_chunk=4,
        sizes={256: Size(0.0006, 0.002, 0.3), 512: Size(0.0026, 0.008, 0.5), 768: Size(0.007, 0.02, 0.2)},
    ),
    "cpu": Device(
        fixed=0.04, max_rows=8, decode_chunk=4, sizes={64: Size(0.03, 0.05, 0.6), 128: Size(0.12, 0.2, 0.4)}
    ),
}
STEPS = {10: 0.2, 20: 0.35, 30: 0.25, 50: 0.2}
IMAGES = {1: 0.7, 2: 0.12, 4: 0.12, 16: 0.06}
ROWS = {2: 0.8, 1: 0.2}  # with guidance and without


@dataclass(eq=False)
class Request:
    """A request, and the time of its response."""

    arrival: float
    size: int
    steps: int
    rows: int  # of one image
    n: int
    client: str = ""
    end: float = 0.0


@dataclass
class Turn:
    """What the device does next: UNet calls, the rows in them, and the requests that it finishes."""

    seconds: float
    ended: list[tuple[float, Request]] = field(default_factory=list)  # seconds after the start
    calls: float = 0
    rows: float = 0


class Policy(Protocol):
    """A way to share the device."""

    def admit(self, request: Request) -> None:
        """Queue a request."""

    def turn(self, now: float, horizon: float) -> Turn | None:
        """What to do now; None if there is nothing. The next request arrives at `horizon`."""


def whole(device: Device, batch: list[Request]) -> Turn:
    """Requests with equal settings from start to end; then their images are decoded one by one."""
    size, steps = batch[0].size, batch[0].steps
    rows = sum(request.n * request.rows for request in batch)
    calls = -(-rows // device.max_rows)
    seconds = steps * (calls * device.fixed + rows * device.sizes[size].row)
    ended = []
    for request in batch:
        seconds += request.n * device.sizes[size].decode
        ended.append((seconds, request))
    return Turn(seconds, ended, calls * steps, rows * steps)


class Batches:
    """Requests with equal settings run as one batch, at most `most` of them, oldest first.

    A batch that is not full waits until its oldest request is `patience` seconds old.
    """

    def __init__(self, device: Device, most: int, patience: float = 0.0) -> None:
        self.device, self.most, self.patience = device, most, patience
        self.queues: dict[tuple, deque[Request]] = defaultdict(deque)

    def admit(self, request: Request) -> None:
        self.queues[request.size, request.steps, request.rows].append(request)

    def turn(self, now: float, horizon: float) -> Turn | None:
        queues = [queue for queue in self.queues.values() if queue]
        if not queues:
            return None
        ready = [queue for queue in queues if len(queue) >= self.most or self._wait(queue, now) < 1e-9]
        if not ready:
            return Turn(min(horizon - now, *(self._wait(queue, now) for queue in queues)))
        return whole(self.device, self._batch(min(ready, key=lambda queue: queue[0].arrival)))

    def _wait(self, queue: deque[Request], now: float) -> float:
        """Seconds until it runs even if it is not full."""
        return queue[0].arrival + self.patience - now

    def _batch(self, queue: deque[Request]) -> list[Request]:
        """The oldest, and those behind it that fit."""
        batch, rows = [], 0
        while queue and len(batch) < self.most:
            rows += queue[0].n * queue[0].rows
            if batch and rows > self.device.max_rows:
                break
            batch.append(queue.popleft())
        return batch


class Steps:
    """What the service does: the scheduler before each UNet call, and some decoding after it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.scheduler = Scheduler(device.max_rows)
        self.requests: dict[str, Request] = {}
        self.undecoded: dict[str, int] = {}  # images
        self.latents: deque[ImageKey] = deque()
        self.names = count()

    def admit(self, request: Request) -> None:
        name = str(next(self.names))
        self.requests[name], self.undecoded[name] = request, request.n
        row_cost = self.device.sizes[request.size].row
        shape = Shape((Segment(request.size, request.rows, request.steps, row_cost),))
        self.scheduler.admit(name, shape, request.n, client=request.client)

    def turn(self, now: float, horizon: float) -> Turn | None:
        picked = self.scheduler.pick()
        if not picked and not self.latents:
            return None
        turn = Turn(0.0)
        if picked:
            rows = sum(self.requests[key.job].rows for key in picked)
            turn = Turn(self.device.call(self.requests[picked[0].job].size, rows), [], 1, rows)
            self.latents += self.scheduler.advance(picked)
        for _ in range(min(self.device.decode_chunk, len(self.latents))):
            self._decode(self.latents.popleft().job, turn)
        return turn

    def _decode(self, name: str, turn: Turn) -> None:
        turn.seconds += self.device.sizes[self.requests[name].size].decode
        self.undecoded[name] -= 1
        if not self.undecoded[name]:
            del self.undecoded[name]
            turn.ended.append((turn.seconds, self.requests.pop(name)))


class Ideal:
    """Ideal processor sharing: at every moment each request has an equal share of the device's time.

    Requests of one size pool their parts into calls of all their rows, or of max_rows shared out as evenly as
    they can use them. One that is through the UNet has its part for D.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.rows: dict[Request, float] = {}  # rows left
        self.decode: dict[Request, float] = {}  # seconds of decoding left

    def admit(self, request: Request) -> None:
        self.rows[request] = request.n * request.steps * request.rows

    def turn(self, now: float, horizon: float) -> Turn | None:
        if not self.rows and not self.decode:
            return None
        part = 1 / (len(self.rows) + len(self.decode))
        speeds, turn = self._speeds(part)
        ends = [self.rows[request] / speed for request, speed in speeds.items()]
        ends += [seconds / part for seconds in self.decode.values()]
        turn.seconds = min(horizon - now, *ends)
        turn.calls, turn.rows = turn.calls * turn.seconds, turn.rows * turn.seconds
        self._run(speeds, part, turn)
        return turn

    def _speeds(self, part: float) -> tuple[dict[Request, float], Turn]:
        """Rows per second of each request in the UNet; calls and rows per second."""
        groups: dict[int, list[Request]] = defaultdict(list)
        for request in self.rows:
            groups[request.size].append(request)
        speeds, turn = {}, Turn(1.0)
        for size, group in groups.items():
            wanted = [request.n * request.rows for request in group]
            rows = min(sum(wanted), self.device.max_rows)
            calls = part * len(group) / self.device.call(size, rows)
            turn.calls, turn.rows = turn.calls + calls, turn.rows + rows * calls
            speeds |= zip(group, [share * calls for share in shared(wanted, rows)], strict=True)
        return speeds, turn

    def _run(self, speeds: dict[Request, float], part: float, turn: Turn) -> None:
        """Advance the simulation by turn.seconds."""
        for request in list(self.decode):
            self.decode[request] -= part * turn.seconds
            if self.decode[request] <= 1e-9:
                del self.decode[request]
                turn.ended.append((turn.seconds, request))
        for request, speed in speeds.items():
            self.rows[request] -= speed * turn.seconds
            if self.rows[request] <= 1e-9:
                del self.rows[request]
                self.decode[request] = request.n * self.device.sizes[request.size].decode


def shared(wanted: list[int], total: float) -> list[float]:
    """The most even shares of `total` of which none is larger than its demand."""
    given = [0.0] * len(wanted)
    for place, index in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        given[index] = min(wanted[index], total / (len(wanted) - place))
        total -= given[index]
    return given


POLICIES: dict[str, Callable[[Device], Policy]] = {
    "one request at a time": lambda device: Batches(device, 1),
    "static batches: 8 or 5 s": lambda device: Batches(device, 8, 5.0),
    "batches of what waits": lambda device: Batches(device, device.max_rows),
    "this scheduler": Steps,
    "ideal sharing": Ideal,
}


def traffic(device: Device, load: float, seconds: float, seed: int) -> Iterator[Request]:
    """Poisson arrivals of a mix of requests. At load 1 they keep a device with full calls busy."""
    chance = random.Random(seed)
    rate = load / mean_work(device)
    sizes = {size: cost.part for size, cost in device.sizes.items()}
    now = chance.expovariate(rate)
    while now < seconds:
        size, steps, rows, n = (draw(chance, t) for t in (sizes, STEPS, ROWS, IMAGES))
        yield Request(now, size, steps, rows, n)
        now += chance.expovariate(rate)


def draw(chance: random.Random, parts: dict[int, float]) -> int:
    return chance.choices(list(parts), list(parts.values()))[0]


def mean_work(device: Device) -> float:
    """Seconds of a mean request in full calls."""
    images, steps, rows = (sum(value * part for value, part in t.items()) for t in (IMAGES, STEPS, ROWS))
    return images * sum(
        size.part * (steps * rows * (device.fixed / device.max_rows + size.row) + size.decode)
        for size in device.sizes.values()
    )


@dataclass
class Outcome:
    """The results of a policy."""

    requests: list[Request]
    alone: list[float]  # seconds of each on an idle device
    seconds: float
    rows_per_call: float

    @property
    def latencies(self) -> list[float]:
        """Seconds, sorted."""
        return sorted(request.end - request.arrival for request in self.requests)

    @property
    def slowdowns(self) -> list[float]:
        pairs = zip(self.requests, self.alone, strict=True)
        return [(request.end - request.arrival) / alone for request, alone in pairs]


def simulate(policy: Policy, device: Device, requests: Iterable[Request]) -> Outcome:
    """Run all requests."""
    coming, done = deque(requests), []
    now = calls = rows = 0.0
    while True:
        while coming and coming[0].arrival <= now:
            policy.admit(coming.popleft())
        horizon = coming[0].arrival if coming else math.inf
        turn = policy.turn(now, horizon)
        if turn is None and not coming:
            alone = [whole(device, [request]).seconds for request in done]
            return Outcome(done, alone, now, rows / calls)
        turn = turn or Turn(horizon - now)
        for after, request in turn.ended:
            request.end = now + after
            done.append(request)
        now, calls, rows = now + turn.seconds, calls + turn.calls, rows + turn.rows


def quantile(ordered: list[float], q: float) -> float:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


COLUMNS = ("images/s", "mean s", "p50 s", "p99 s", "p99/ideal", "fairness", "worst slowdown", "rows/call")


def width(name: str) -> int:
    return max(len(name), 7) + 2


def figures(outcome: Outcome, ideal: Outcome) -> list[float]:
    """The values of COLUMNS."""
    latencies, slowdowns = outcome.latencies, outcome.slowdowns
    p99 = quantile(latencies, 0.99)
    return [
        sum(request.n for request in outcome.requests) / outcome.seconds,
        statistics.fmean(latencies),
        quantile(latencies, 0.5),
        p99,
        p99 / quantile(ideal.latencies, 0.99),
        sum(slowdowns) ** 2 / (len(slowdowns) * sum(slowdown**2 for slowdown in slowdowns)),
        max(slowdowns),
        outcome.rows_per_call,
    ]


def table(device: Device, loads: list[float], hours: float, seed: int) -> Iterator[str]:
    """One line for each load and policy."""
    yield f"{'load':>4} {'policy':24}" + "".join(f"{name:>{width(name)}}" for name in COLUMNS)
    for load in loads:
        outcomes = {
            name: simulate(make(device), device, traffic(device, load, hours * 3600, seed))
            for name, make in POLICIES.items()
        }
        for name, outcome in outcomes.items():
            values = zip(COLUMNS, figures(outcome, outcomes["ideal sharing"]), strict=True)
            yield f"{load:4.0%} {name:24}" + "".join(f"{value:{width(name)}.2f}" for name, value in values)


def flood(device: Device) -> Iterator[str]:
    """The latency of client B's small requests while client A has sent enough to keep the device busy.

    B sends one each ten times as long as it takes on an idle device.
    """
    small, large = min(device.sizes), max(device.sizes)
    yield f"{'small requests of client B':52} p50 s    p99 s   images/s of A"
    for name, clients in (
        ("alone", ""),
        ("with A, one queue for all", "--"),
        ("with A, a share for each client", "AB"),
    ):
        for which, size, steps, n in (("A's are the same", small, 20, 1), ("A's are large", large, 30, 4)):
            gap = 10 * whole(device, [Request(0.0, small, 20, 2, 1)]).seconds
            own = [Request(gap * index, small, 20, 2, 1, clients[-1:]) for index in range(1, 100)]
            work = n * (steps * 2 * (device.fixed / device.max_rows + device.sizes[size].row))
            many = math.ceil(100 * gap / work) if clients else 0
            crowd = [Request(0.0, size, steps, 2, n, clients[0]) for _ in range(many)]
            outcome = simulate(Steps(device), device, crowd + own)
            latencies = sorted(one.end - one.arrival for one in own)
            images = sum(one.n for one in outcome.requests if one.end <= own[-1].end) - len(own)
            yield (
                f"{name + ', ' + which:52} {quantile(latencies, 0.5):5.2f}  {quantile(latencies, 0.99):7.2f}"
                f"   {images / own[-1].end:.2f}"
            )


def tick_seconds(steps: Sequence[int]) -> float:
    """pick() and advance() with 64 jobs running and 1,000 waiting, their step counts from `steps` in turn.

    The fastest of many: other programs only ever add time. Ended jobs are replaced between measurements.
    """
    scheduler, names, best = Scheduler(128), count(), math.inf
    for _ in range(500):
        while len(scheduler) < 1064:
            name = next(names)
            segment = Segment("group", rows=2, evaluations=steps[name % len(steps)], row_cost=1.0)
            scheduler.admit(str(name), Shape((segment,)), images=1)
        best = min(best, timeit.timeit(lambda: scheduler.advance(scheduler.pick()), number=20) / 20)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=DEVICES, default="gpu", help="the cost model")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 0.95])
    parser.add_argument("--hours", type=float, default=4.0, help="of traffic")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic")
    args = parser.parse_args()
    for line in table(DEVICES[args.device], args.loads, args.hours, args.seed):
        print(line, flush=True)
    for line in flood(DEVICES[args.device]):
        print(line)
    steady, mixed = tick_seconds([10**9]), tick_seconds(range(10, 51))
    print(f"a tick, 64 jobs running and 1,000 waiting: {steady * 1e6:.1f} us, {mixed * 1e6:.1f} as jobs end")


if __name__ == "__main__":
    main()

"""Placement of jobs on several replicas against simple rules, in simulated time.

python -m tests.benchmarks.placements --replicas 64 --minutes 60 --loads 0.5 0.7 0.85

Nothing runs on a device: UNet calls and decoding cost what tests/benchmarks/pacing.py estimates for an H200.
Each replica runs the service's scheduler, and the service's placement decides when the service's supervisor
would ask it: when a request comes or ends, and twice a second while a replica is idle. Requests choose one of
three models; their rate follows a day in the simulated time, from half to one and a half of the mean. A
replica holds `--held` models, and loads another one when one of those that it holds has no jobs.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from service.engine.events import JobSteps, Stepped
from service.engine.job import ImageKey, Job, ModelKey, Segment, Shape
from service.engine.scheduler import Scheduler
from service.worker.placement import Placement
from tests.benchmarks.pacing import MODELS as COSTS
from tests.benchmarks.pacing import Costs
from tests.benchmarks.policies import IMAGES, ROWS, STEPS, draw, quantile

MAX_ROWS = 32
DECODE_CHUNK = 4
HEARTBEAT_SECONDS = 0.5
DOLLARS_PER_HOUR = 2.5  # of one GPU; a list price for an H100 or H200, which differ between vendors


@dataclass(frozen=True)
class Served:
    """A model. part: its share of the requests; size: of its images; load: seconds to load it."""

    part: float
    size: int
    costs: Costs
    load: float

    def call(self, rows: int) -> float:
        """Seconds of a UNet call."""
        return self.costs.fixed + rows * self.costs.row

    @property
    def mean_work(self) -> float:
        """Seconds of a mean request in full calls."""
        images, steps, rows = (sum(value * part for value, part in t.items()) for t in (IMAGES, STEPS, ROWS))
        return images * (steps * rows * self.call(MAX_ROWS) / MAX_ROWS + self.costs.decode)


MODELS = {
    "sd15": Served(0.6, 512, COSTS["Stable Diffusion 1.5, 512"], 1.5),
    "sdxl": Served(0.3, 1024, COSTS["SDXL, 1024"], 4.0),
    "ldm": Served(0.1, 256, COSTS["LDM text, 256"], 1.5),
}


@dataclass(eq=False)
class Request:
    """A request, and the time of its response."""

    job: Job
    arrival: float
    end: float = 0.0
    started: bool = False


@dataclass
class Replica:
    """A simulated replica: jobs wait until their model is held, then the scheduler has them."""

    number: int
    held: int
    scheduler: Scheduler = field(default_factory=lambda: Scheduler(MAX_ROWS))
    models: OrderedDict[str, int] = field(
        default_factory=OrderedDict
    )  # held -> jobs, least recently used first
    pending: deque[Request] = field(default_factory=deque)
    admitted: dict[str, Request] = field(default_factory=dict)
    undecoded: dict[str, int] = field(default_factory=dict)
    latents: deque[ImageKey] = field(default_factory=deque)
    done_steps: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    busy_seconds: float = 0.0
    loads: int = 0
    is_running: bool = False

    @property
    def jobs(self) -> int:
        return len(self.pending) + len(self.admitted)

    def turn(self, world: World) -> tuple[float, list[tuple[float, Request]]] | None:
        """What it does next: seconds, and requests that end so many seconds after its start."""
        seconds = self._admit(world)
        picked = self.scheduler.pick()
        if not picked and not self.latents:
            return (seconds, []) if seconds else None
        if picked:
            seconds += self._call(picked, world)
        ended = []
        for _ in range(min(DECODE_CHUNK, len(self.latents))):
            job = self.latents.popleft().job
            request = self.admitted[job]
            seconds += MODELS[request.job.model].costs.decode
            self.undecoded[job] -= 1
            if not self.undecoded[job]:
                del self.undecoded[job], self.admitted[job]
                self.models[request.job.model] -= 1
                ended.append((seconds, request))
        return seconds, ended

    def _admit(self, world: World) -> float:
        """Admit the jobs whose models are held or can be loaded; returns the seconds of loading."""
        seconds = 0.0
        waiting, self.pending = self.pending, deque()
        for request in waiting:
            job, model = request.job, request.job.model
            if model not in self.models:
                idle = [name for name, jobs in self.models.items() if not jobs]
                if len(self.models) >= self.held and not idle:
                    self.pending.append(request)
                    continue
                if len(self.models) >= self.held:
                    del self.models[idle[0]]
                seconds += MODELS[model].load
                self.loads += 1
                self.models[model] = 0
                world.placement.load(ModelKey(model), MODELS[model].load)
                world.placement.hold(self.number, map(ModelKey, self.models))
            self.models[model] += 1
            self.models.move_to_end(model)
            self.admitted[job.id], self.undecoded[job.id] = request, job.n
            row_cost = MODELS[model].costs.row
            rows = 1 if job.guidance_scale == 1 else 2
            shape = Shape((Segment(model, rows, job.steps, row_cost),))
            self.scheduler.admit(job.id, shape, job.n)
        return seconds

    def _call(self, picked: list[ImageKey], world: World) -> float:
        rows: defaultdict[str, int] = defaultdict(int)
        for key in picked:
            request = self.admitted[key.job]
            if not request.started:
                request.started = True
                world.placement.start(key.job, request.job.n * request.job.steps)
            rows[key.job] += 1 if request.job.guidance_scale == 1 else 2
            self.done_steps[key.job] += 1
        total = sum(rows.values())
        seconds = MODELS[request.job.model].call(total)
        jobs = tuple(JobSteps(job, self.done_steps[job], own) for job, own in rows.items())
        world.placement.step(Stepped(total, total, len(picked), seconds, 0, 0, jobs))
        self.latents += self.scheduler.advance(picked)
        return seconds


class World:
    """Replicas, requests that come, and the rule that shares them out. `moves`: waiting jobs may move."""

    def __init__(self, replicas: list[Replica], rule: Callable[[World, Job], int], moves: bool) -> None:
        self.replicas = replicas
        self.rule = rule
        self.may_move = moves
        self.placement = Placement(MAX_ROWS)
        self.round = itertools.cycle(range(len(replicas)))
        self.moved = 0
        first = next(iter(MODELS))
        for replica in replicas:
            replica.models[first] = 0
            self.placement.hold(replica.number, [ModelKey(first)])

    def run(self, requests: Iterator[Request]) -> list[Request]:
        """All requests, answered."""
        done: list[Request] = []
        number = itertools.count()
        events: list[tuple[float, int, object]] = []
        coming = next(requests, None)
        next_heartbeat = 0.0
        while coming or events:
            if coming and (not events or coming.arrival <= events[0][0]):
                now, woken = coming.arrival, {self._send(coming)} | self._move()
                coming = next(requests, None)
            else:
                now, _, what = heapq.heappop(events)
                if isinstance(what, Request):
                    self.placement.remove(what.job.id)
                    done.append(what)
                    woken = self._move()
                else:
                    assert isinstance(what, Replica)
                    what.is_running = False
                    woken = {what.number}
            if now >= next_heartbeat:
                next_heartbeat = now + HEARTBEAT_SECONDS
                woken |= self._move() if any(not replica.jobs for replica in self.replicas) else set()
            for index in woken:
                replica = self.replicas[index]
                if not replica.is_running and (turn := replica.turn(self)):
                    seconds, ended = turn
                    replica.busy_seconds += seconds
                    replica.is_running = True
                    heapq.heappush(events, (now + seconds, next(number), replica))
                    for after, request in ended:
                        request.end = now + after
                        heapq.heappush(events, (request.end, next(number), request))
        return done

    def _send(self, request: Request) -> int:
        index = self.rule(self, request.job)
        self.placement.send(request.job, index)
        self.replicas[index].pending.append(request)
        return index

    def _move(self) -> set[int]:
        """Move jobs that have not started, at once; returns the replicas that got some."""
        woken = set()
        for move in self.placement.moves(range(len(self.replicas))) if self.may_move else ():
            source = self.replicas[move.source]
            request = next((r for r in source.pending if r.job.id == move.job), None)
            if request:
                source.pending.remove(request)
            else:
                request = source.admitted.pop(move.job)
                source.scheduler.remove(move.job)
                source.models[request.job.model] -= 1
                del source.undecoded[move.job]
            self.placement.remove(move.job)
            woken.add(self._send(request))
            self.moved += 1
        return woken


def in_turn(world: World, job: Job) -> int:
    return next(world.round)


def fewest_jobs(world: World, job: Job) -> int:
    return min(world.replicas, key=lambda replica: replica.jobs).number


def placed(world: World, job: Job) -> int:
    return world.placement.choose(job, range(len(world.replicas)))


RULES: dict[str, tuple[Callable[[World, Job], int], bool]] = {
    "round robin": (in_turn, False),
    "fewest jobs": (fewest_jobs, False),
    "placement, no moves": (placed, False),
    "placement": (placed, True),
}


def traffic(replicas: int, load: float, seconds: float, seed: int) -> Iterator[Request]:
    """Poisson arrivals with a rate that follows a day: from half to one and a half of the mean."""
    chance = random.Random(seed)
    mean = load * replicas / sum(model.part * model.mean_work for model in MODELS.values())
    parts = {name: model.part for name, model in MODELS.items()}
    now = 0.0
    for number in itertools.count():
        now += chance.expovariate(1.5 * mean)
        if now >= seconds:
            return
        rate = 1 + 0.5 * math.sin(2 * math.pi * now / seconds)
        if chance.random() < rate / 1.5:
            steps, rows, n, model = (draw(chance, t) for t in (STEPS, ROWS, IMAGES, parts))
            size = MODELS[model].size
            job = Job(str(number), model, "", "", size, size, steps, float(rows), number, n, "ddim", 0.0)
            yield Request(job, now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.7, 0.9])
    parser.add_argument("--held", type=int, default=1)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{args.replicas} replicas, {args.minutes:g} minutes, {args.held} of {len(MODELS)} models held")
    for load in args.loads:
        for name in args.rules:
            print(f"load {load:g}  {name:20}  {simulate(args, load, *RULES[name])}", flush=True)


def simulate(args: argparse.Namespace, load: float, rule: Callable[[World, Job], int], moves: bool) -> str:
    replicas = [Replica(number, args.held) for number in range(args.replicas)]
    world = World(replicas, rule, moves)
    done = world.run(traffic(args.replicas, load, args.minutes * 60, args.seed))
    latencies = sorted(request.end - request.arrival for request in done)
    end = max(request.end for request in done)
    images = sum(request.job.n for request in done)
    busy = sum(replica.busy_seconds for replica in replicas) / (end * len(replicas))
    price = args.replicas * end / 3600 * DOLLARS_PER_HOUR / images * 1000
    mean = sum(latencies) / len(latencies)
    return (
        f"mean {mean:6.2f} s  p50 {quantile(latencies, 0.5):6.2f}  p99 {quantile(latencies, 0.99):7.2f}  "
        f"busy {busy:4.0%}  loads {sum(replica.loads for replica in replicas):5}  moved {world.moved:5}  "
        f"$ per 1,000 images {price:.3f}"
    )


if __name__ == "__main__":
    main()

"""Which replica runs a job: pure Python, without clocks or processes.

The cost of a job at a replica is the time in which the replica would finish all its jobs and this one, with
the loading of its model if the replica does not hold it. A job goes to the replica with the lowest cost. If
the costs of several are about the same, it goes to the one whose work it adds to least: there it shares UNet
calls. Jobs that have not started may move later, when another replica would finish them clearly earlier.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from cachetools import LRUCache

from models.sampling.guidance import row_count
from service.engine.events import Stepped
from service.engine.job import Job, ModelKey
from service.worker.call_times import CallTimes

SLACK = 0.1  # costs that are higher than the lowest by less than this part count as about the same
LOAD_SECONDS = 5.0  # of a model, before any was loaded
LORA_SECONDS = 1.0  # of a set of LoRAs, before any was merged
MAX_LOADS = 1024  # of different keys, whose seconds are remembered
LOAD_ALPHA = 0.3  # weight of the newest load in the average


class Kind(NamedTuple):
    """Jobs of one kind may share UNet calls: about what the engine calls a group."""

    key: ModelKey
    width: int
    height: int


class Move(NamedTuple):
    """A job that has not started, and the replicas that it leaves and goes to."""

    job: str
    source: int
    target: int


@dataclass
class Placed:
    """A job and what is left of it. steps: of all its images together; rows: of an image in its last call."""

    job: Job
    steps: float
    total: float
    rows: float
    started: bool = False
    target: int | None = None  # the replica that it moves to

    @property
    def kind(self) -> Kind:
        return Kind(self.job.model_key, self.job.width, self.job.height)


@dataclass
class Site:
    """A replica: its jobs, those that move to it, and the models and LoRA sets that its worker has loaded."""

    jobs: dict[str, Placed] = field(default_factory=dict)
    coming: dict[str, Placed] = field(default_factory=dict)
    holds: frozenset[ModelKey] = frozenset()

    @property
    def waiting(self) -> list[Placed]:
        """The jobs that have not started and do not move."""
        return [placed for placed in self.jobs.values() if not placed.started and placed.target is None]

    def has(self, key: ModelKey) -> bool:
        """Whether it has loaded a model with its LoRAs, or will for a job that it has."""
        return key in self.holds or any(placed.job.model_key == key for placed in self.jobs.values())


class Placement:
    """The jobs at all replicas, and how long they take. max_rows: of a UNet call."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.times = CallTimes()
        self._sites: defaultdict[int, Site] = defaultdict(Site)
        self._places: dict[str, int] = {}  # job -> replica
        self._load_seconds: LRUCache[ModelKey, float] = LRUCache(MAX_LOADS)

    # What happens.

    def send(self, job: Job, replica: int) -> None:
        """Record that a job was sent to a replica."""
        self._sites[replica].jobs[job.id] = estimate(job)
        self._places[job.id] = replica

    def remove(self, job: str) -> None:
        """Forget a job that has left its replica; an unknown one is ignored."""
        if placed := self._find(job):
            self._redirect(placed, None)
            del self._sites[self._places.pop(job)].jobs[job]

    def clear(self, replica: int) -> None:
        """Forget the jobs and models of a replica whose worker has ended."""
        for job in list(self._sites[replica].jobs):
            self.remove(job)
        for placed in list(self._sites[replica].coming.values()):
            self._redirect(placed, None)
        self._sites[replica].holds = frozenset()

    def start(self, job: str, steps: int) -> None:
        """Record that a job has started, with the steps of all its images; unknown jobs are ignored."""
        if placed := self._find(job):
            self._redirect(placed, None)
            placed.started = True
            placed.steps = placed.total = steps

    def step(self, call: Stepped) -> None:
        """Record a UNet call: how long it took, and the steps that its jobs have done."""
        for job, steps, rows in call.jobs:
            if placed := self._find(job):
                left = max(0.0, placed.total - steps)
                if left < placed.steps:
                    placed.rows = rows / (placed.steps - left)
                placed.steps = left
        if placed := self._find(call.jobs[0].job) if call.jobs else None:
            self.times.record(placed.kind, pixels_of(placed.job), call.padded, call.seconds)

    def hold(self, replica: int, keys: Iterable[ModelKey]) -> None:
        """Record which models, and models with LoRAs, a replica has loaded."""
        self._sites[replica].holds = frozenset(keys)

    def load(self, key: ModelKey, seconds: float) -> None:
        """Record how long a replica took to load a model or to merge its LoRAs."""
        before = self._load_seconds.get(key, seconds)
        self._load_seconds[key] = before + LOAD_ALPHA * (seconds - before)

    # What to do.

    def holds(self, replica: int) -> frozenset[ModelKey]:
        """What a replica has loaded, as it last reported."""
        return self._sites[replica].holds

    def choose(self, job: Job, among: Collection[int]) -> int:
        """The replica to send a job to, one of `among`."""
        placed = estimate(job)
        costs = {replica: self._cost(placed, replica) for replica in among}
        limit = min(costs.values()) * (1 + SLACK)
        near = [replica for replica, cost in costs.items() if cost <= limit]
        return min(near, key=lambda replica: (costs[replica] - self.work(replica), replica))

    def moves(self, among: Collection[int]) -> list[Move]:
        """Jobs to move now, at most one to each replica; `among`: replicas that may get jobs."""
        waiting = {number: jobs for number, site in self._sites.items() if (jobs := site.waiting)}
        if not waiting or len(self._sites) == 1:
            return []
        work = {number: self.work(number) for number in self._sites.keys() | set(among)}
        moves = []
        targets = [number for number in among if not self._sites[number].coming]
        for target in sorted(targets, key=work.__getitem__):
            least = work[target] * (1 + SLACK)
            sources = [number for number in waiting if number != target and work[number] > least]
            for source in sorted(sources, key=work.__getitem__, reverse=True):
                if placed := self._movable(waiting[source], target, work[source]):
                    moves.append(Move(placed.job.id, source, target))
                    self._redirect(placed, target)
                    waiting[source].remove(placed)
                    work[source] = self.work(source)
                    break
        return moves

    def work(self, replica: int) -> float:
        """Seconds until a replica has finished its jobs, those included that move to it."""
        return self._seconds(self._jobs_at(replica))

    def _movable(self, waiting: list[Placed], target: int, work: float) -> Placed | None:
        """A job that ends clearly earlier at `target` than in `work` seconds, when its own replica is done.

        Either the first job whose model the target holds, or the first one.
        """
        held = [placed for placed in waiting if self._sites[target].has(placed.job.model_key)]
        for placed in (*held[:1], *waiting[:1]):
            if self._cost(placed, target) * (1 + SLACK) < work:
                return placed
        return None

    def _redirect(self, placed: Placed, target: int | None) -> None:
        """Let a job move to another replica, or not any more."""
        if placed.target is not None:
            del self._sites[placed.target].coming[placed.job.id]
        if target is not None:
            self._sites[target].coming[placed.job.id] = placed
        placed.target = target

    def _find(self, job: str) -> Placed | None:
        return self._sites[self._places[job]].jobs[job] if job in self._places else None

    def _jobs_at(self, replica: int) -> list[Placed]:
        """The jobs of a replica, without those that leave it and with those that move to it."""
        site = self._sites[replica]
        return [*(placed for placed in site.jobs.values() if placed.target is None), *site.coming.values()]

    def _cost(self, placed: Placed, replica: int) -> float:
        """Seconds until the replica would have finished all its jobs and this one."""
        seconds = self._seconds([*self._jobs_at(replica), placed])
        return seconds + self._loading(placed.job.model_key, self._sites[replica])

    def _loading(self, key: ModelKey, site: Site) -> float:
        """Seconds that a replica needs to load what it does not hold of a job's model and LoRAs."""
        if site.has(key):
            return 0.0
        lora = self._load_seconds.get(key, LORA_SECONDS) if key.loras else 0.0
        model = ModelKey(key.model)
        has_model = site.has(model) or any(held.model == key.model for held in site.holds)
        return lora + (0.0 if has_model else self._load_seconds.get(model, LOAD_SECONDS))

    def _seconds(self, jobs: Iterable[Placed]) -> float:
        """Seconds that jobs take together: those of one kind share UNet calls, those of others take turns."""
        kinds: defaultdict[Kind, list[Placed]] = defaultdict(list)
        for placed in jobs:
            kinds[placed.kind].append(placed)
        return sum(self._seconds_of_kind(kind, same) for kind, same in kinds.items())

    def _seconds_of_kind(self, kind: Kind, jobs: list[Placed]) -> float:
        rows = sum(placed.steps * placed.rows for placed in jobs)
        calls = max(rows / self.max_rows, *(placed.steps / placed.job.n for placed in jobs), 0.0)
        pixels = kind.width * kind.height
        return calls * self.times.seconds(kind, pixels, rows / calls) if calls else 0.0


def estimate(job: Job) -> Placed:
    """A new job, before its replica reports the exact number of its steps and rows."""
    steps = job.n * max(1.0, job.steps * job.strength)
    return Placed(job, steps, steps, row_count(job.guidance_scale))


def pixels_of(job: Job) -> int:
    return job.width * job.height

"""Which replica runs a job: pure Python, without clocks or processes.

The cost of a job at a replica is the time in which the replica would finish all its jobs and this one, with
the loading of its model if the replica does not hold it. A job goes to the replica with the lowest cost. If
the costs of several are about the same, it goes to the one whose work it adds to least: there it shares UNet
calls. Jobs that have not started may move later, when another replica would finish them clearly earlier.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from cachetools import LRUCache

from service.engine.events import Stepped
from service.engine.job import Job, ModelKey
from service.worker.call_times import CallTimes
from service.worker.site import Kind, Load, Placed, Site, estimate

SLACK = 0.1  # costs that are higher than the lowest by less than this part count as about the same
LOAD_SECONDS = 5.0  # of a model, before any was loaded
LORA_SECONDS = 1.0  # of a set of LoRAs, before any was merged
MAX_LOADS = 1024  # of different keys, whose seconds are remembered
LOAD_ALPHA = 0.3  # weight of the newest load in the average


class Move(NamedTuple):
    """A job that has not started, and the replicas that it leaves and goes to."""

    job: str
    source: int
    target: int


class Offer(NamedTuple):
    """A job that may move. seconds: a lower bound of the work that it adds to a replica, without loading."""

    placed: Placed
    seconds: float


class Bid(NamedTuple):
    """A replica that may get a job.

    work: seconds until it has finished its jobs; loading: seconds to load each model, as far as computed.
    """

    target: int
    work: float
    loading: dict[ModelKey, float]

    def is_below(self, work: float, more: float = 0.0) -> bool:
        """Whether its work, with `more` seconds, is clearly less than `work` seconds."""
        return (self.work + more) * (1 + SLACK) < work


class Placement:
    """The jobs at all replicas, and how long they take. max_rows: the most rows of a UNet call."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.times = CallTimes()
        self._sites: defaultdict[int, Site] = defaultdict(Site)
        self._places: dict[str, int] = {}  # job -> replica
        self._load_seconds: LRUCache[ModelKey, float] = LRUCache(MAX_LOADS)

    # What happens.

    def send(self, job: Job, replica: int) -> None:
        """Record that a job was sent to a replica."""
        self._sites[replica].add(estimate(job))
        self._places[job.id] = replica

    def remove(self, job: str) -> None:
        """Forget a job that has left its replica; an unknown one is ignored."""
        if placed := self._find(job):
            self._redirect(placed, None)
            self._sites[self._places.pop(job)].remove(job)

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
                self._site_of(placed).changed()
        if placed := self._find(call.jobs[0].job) if call.jobs else None:
            self.times.record(placed.kind, placed.kind.pixels, call.padded, call.seconds)

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
        offers = {number: jobs for number in self._sites if (jobs := self._offers(number))}
        if not offers or len(self._sites) == 1:
            return []
        work = {number: self.work(number) for number in self._sites.keys() | set(among)}
        moves = []
        targets = [number for number in among if not self._sites[number].coming]
        for target in sorted(targets, key=work.__getitem__):
            bid = Bid(target, work[target], {})
            sources = [number for number in offers if number != target and bid.is_below(work[number])]
            for source in sorted(sources, key=work.__getitem__, reverse=True):
                if placed := self._movable(offers[source], bid, work[source]):
                    moves.append(Move(placed.job.id, source, target))
                    self._redirect(placed, target)
                    work[source], offers[source] = self.work(source), self._offers(source)
                    break
        return moves

    def work(self, replica: int) -> float:
        """Seconds until a replica has finished its jobs, those included that move to it."""
        return self._total(self._sites[replica].summary.loads)

    def _offers(self, source: int) -> list[Offer]:
        """Jobs that could move: the first one that waits for each model, in the order of their jobs."""
        first = self._sites[source].summary.first
        return [Offer(placed, self._least_seconds(placed)) for placed in first.values()]

    def _least_seconds(self, placed: Placed) -> float:
        """A lower bound of the seconds that a job adds to a replica, without loading; quick to compute."""
        return placed.steps * placed.rows * self.times.row_seconds(placed.kind, placed.kind.pixels)

    def _movable(self, offers: list[Offer], bid: Bid, work: float) -> Placed | None:
        """A job that the target would finish clearly before its own replica finishes all its jobs.

        work: seconds until the job's own replica has finished. Two jobs are tried: the first one whose model
        the target holds, and the first one of all.
        """
        site = self._sites[bid.target]
        held = [offer for offer in offers if site.has(offer.placed.kind.key)]
        for placed, seconds in (*held[:1], *offers[:1]):
            key = placed.kind.key
            if key not in bid.loading:
                bid.loading[key] = self._loading(key, site)
            # Most pairs of replicas end at the lower bound.
            if (
                bid.is_below(work, bid.loading[key] + seconds)
                and self._cost(placed, bid.target) * (1 + SLACK) < work
            ):
                return placed
        return None

    def _redirect(self, placed: Placed, target: int | None) -> None:
        """Let a job move to another replica, or not any more."""
        self._site_of(placed).changed()
        if placed.target is not None:
            del self._sites[placed.target].coming[placed.job.id]
        placed.target = target
        if target is not None:
            self._sites[target].coming[placed.job.id] = placed
        self._sites[self._places[placed.job.id]].changed()
        self._site_of(placed).changed()

    def _site_of(self, placed: Placed) -> Site:
        """The replica whose work includes a job: its own, or the one that it moves to."""
        return self._sites[self._places[placed.job.id] if placed.target is None else placed.target]

    def _find(self, job: str) -> Placed | None:
        return self._sites[self._places[job]].jobs[job] if job in self._places else None

    def _cost(self, placed: Placed, replica: int) -> float:
        """Seconds until the replica would have finished all its jobs and this one."""
        site = self._sites[replica]
        loads = site.summary.loads
        together = loads.get(placed.kind, Load()).with_job(placed)
        return self._total({**loads, placed.kind: together}) + self._loading(placed.kind.key, site)

    def _loading(self, key: ModelKey, site: Site) -> float:
        """Seconds that a replica needs to load what it does not hold of a job's model and LoRAs."""
        if site.has(key):
            return 0.0
        lora = self._load_seconds.get(key, LORA_SECONDS) if key.loras else 0.0
        model = ModelKey(key.model)
        has_model = site.has(model) or any(held.model == key.model for held in site.holds)
        return lora + (0.0 if has_model else self._load_seconds.get(model, LOAD_SECONDS))

    def _total(self, loads: Mapping[Kind, Load]) -> float:
        """Seconds of all loads: jobs of one kind share UNet calls, those of several kinds take turns."""
        return sum(self._seconds(kind, load) for kind, load in loads.items())

    def _seconds(self, kind: Kind, load: Load) -> float:
        calls = max(load.rows / self.max_rows, load.steps)
        return calls * self.times.seconds(kind, kind.pixels, load.rows / calls) if calls else 0.0

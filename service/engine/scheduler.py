"""The scheduler: the queue of jobs, and which of their images share the next UNet call."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterable
from typing import NamedTuple

from cachetools import LRUCache

from service.engine.fair_queue import PhaseCalls, Queued
from service.engine.job import ImageKey, Shape
from service.engine.row_limits import MAX_GROUPS
from service.engine.shares import Share, Shares

PATIENCE = 8  # full calls that may pass over the oldest job; with fewer, large old jobs delay small ones
TOP_PRIORITY = 9


class Position(NamedTuple):
    """A job that has not started. position: 1 is next; ahead: work left before it; own: its own work."""

    job: str
    position: int
    ahead: float
    own: float


class Scheduler:
    """Admits jobs and picks the images of each UNet call: of one group, within its limit of rows.

    A job passes through its phases one after the other, all its images together: in each it is queued as a
    job of the phase's group, and at the end of a phase it leaves the queue until proceed() puts it into the
    next one. The rows of an image may change within a phase.

    Work is rows * row_cost, and that of control networks. Clients share it by weight while they have jobs:
    the one that has had the least for its weight fills the call first, with jobs of the group whose turn it
    is among its own; jobs of other clients in the same group fill the rest. So a client with thousands of
    jobs delays the jobs of another one no more than a client with one long job does.

    Within a group of a client, jobs run in the order in which
    processor sharing would finish them (the fair sojourn protocol, Friedman and Henderson 2003). So jobs
    finish one after the other instead of all late, a small one overtakes a large one, and if a call holds one
    image, no job finishes later than under processor sharing (for larger calls see
    tests/benchmarks/policies.py). The weight of a job is 4 ** priority. Groups take turns by work done per
    job. If all rows of a group fit in a call, all run.

    The bound on waiting: when the work of `patience` full calls (of max_rows rows of its group) was done
    without the oldest job, the next call is of its group, with the oldest job first. So, whatever is admitted
    later and at whatever priority, a job has its last step before the device has done (patience + 2) * S * F
    more work, not counting work done while the job is between two phases. S: steps, of single images, left at
    its admission of the job and of all jobs before it. F: the most work of a full call of any group, control
    networks included.
    """

    def __init__(self, max_rows: int, patience: float = PATIENCE) -> None:
        if max_rows < 2:
            raise ValueError(f"max_rows must be at least 2, not {max_rows}")
        self.max_rows = max_rows
        self.patience = patience
        self._limits: LRUCache[Hashable, int] = LRUCache(MAX_GROUPS)
        self._jobs: OrderedDict[str, Queued] = OrderedDict()  # by admission
        self._shares = Shares()
        self._numbers = 0  # of jobs admitted so far
        self._passed = 0.0  # work done since the oldest job ran or became the oldest
        self._started = 0  # number of jobs in _jobs that have had a step

    def __len__(self) -> int:
        """The number of jobs with steps left."""
        return len(self._jobs)

    @property
    def running(self) -> int:
        """The number of jobs that have had a step and have more left."""
        return self._started

    @property
    def waiting(self) -> int:
        """The number of jobs that have had no step yet."""
        return len(self._jobs) - self._started

    @property
    def work(self) -> float:
        """The work left of all jobs."""
        return sum(job.work for job in self._jobs.values())

    def limit(self, group: Hashable, rows: int | None) -> None:
        """Set the most rows of a group's calls; None removes the limit. max_rows applies in any case.

        An image of more rows is still picked, alone.
        """
        if rows is None:
            self._limits.pop(group, None)
        elif rows < 1:
            raise ValueError(f"a limit must be at least 1 row, not {rows}")
        else:
            self._limits[group] = rows

    def admit(
        self, job: str, shape: Shape, images: int, priority: int = 0, client: str = "", share: float = 1.0
    ) -> None:
        """Queue `images` images of a shape. share: the client's weight, compared to other clients.

        Raises ValueError for a job that is queued already.
        """
        if job in self._jobs:
            raise ValueError(f"job {job} is queued already")
        if images < 1:
            raise ValueError(f"job {job} needs at least 1 image, not {images}")
        self._numbers += 1
        weight = 4.0 ** max(-TOP_PRIORITY, min(priority, TOP_PRIORITY))
        first, *later = map(PhaseCalls, shape.phases)
        own = self._shares.enter(client, share)
        self._jobs[job] = queued = Queued(job, self._numbers, own, weight, images, first, deque(later))
        queued.begin_phase()
        own.join(queued)

    def proceed(self, job: str) -> None:
        """Start the next phase of a job whose images have all finished one and are ready for the next."""
        queued = self._jobs[job]
        queued.share.join(queued)

    def pick(self) -> list[ImageKey]:
        """The images of the next UNet call: of one group, within its limit; [] when nothing is left."""
        oldest, shares = self._oldest(), self._shares.in_turn()
        if oldest is None or oldest.group is None:
            return []
        overdue = self._passed >= self.patience * self.max_rows * oldest.group.row_cost
        group = oldest.group if overdue else shares[0].next_group
        limit = min(self.max_rows, self._limits.get(group.key, self.max_rows))
        first = oldest if overdue else group.first
        longest = first.longest(1)
        if first.rows(longest[0]) > limit:
            return longest
        picked, taken = first.fill(limit)
        for share in shares:
            if mates := share.groups.get(group.key):
                keys, rows = mates.fill(limit - taken, skip=first)
                picked += keys
                taken += rows
        return picked

    def advance(self, keys: Iterable[ImageKey]) -> list[ImageKey]:
        """Count one step of each of these images of one group; returns those that have finished a phase."""
        finished, ran = [], False
        work: dict[Share, float] = defaultdict(float)
        oldest, group = self._oldest(), None
        for key in keys:
            job = self._jobs[key[0]]
            group, left = job.group, job.left[key]
            work[job.share] += job.phase.segment_at(left).call_work
            job.left[key] = left - 1
            if left <= 1:
                finished.append(key)
            if job is oldest:
                ran = True
            if not job.started:
                job.started = True
                self._started += 1
        if group:
            self._passed = 0.0 if ran else self._passed + sum(work.values())
            for share, spent in work.items():
                share.spend(group.key, spent)
            self._shares.raise_level()
        for key in finished:
            self._finish(key)
        return finished

    def remove(self, job: str) -> None:
        """Forget a job and free its rows; one that is not queued is left alone."""
        if job in self._jobs:
            queued = self._jobs[job]
            if queued is self._oldest():
                self._passed = 0.0
            if queued.group:
                queued.share.cancel(queued, queued.group)
            self._drop(queued)

    def queue(self) -> list[Position]:
        """Jobs that have not started, in the order in which they would start if no others came."""
        positions: list[Position] = []
        ahead = 0.0
        for job in self._in_order():
            work = job.work
            if not job.started:
                positions.append(Position(job.name, len(positions) + 1, ahead, work))
            ahead += work
        return positions

    def _in_order(self) -> list[Queued]:
        """All jobs, in the order in which they would end if no others came."""
        used: dict[Share, float] = {}
        ends: list[tuple[float, int, Queued]] = []
        for job in sorted(self._jobs.values(), key=lambda job: (job.time_left, job.number)):
            used[job.share] = used.get(job.share, job.share.used) + job.work / job.share.weight
            ends.append((used[job.share], len(ends), job))
        return [job for _, _, job in sorted(ends)]

    def position(self, job: str) -> Position | None:
        """A job's position; None once it has started, or when it is not queued."""
        return next((position for position in self.queue() if position.job == job), None)

    def _oldest(self) -> Queued | None:
        """The oldest job in a group."""
        return next((job for job in self._jobs.values() if job.group), None)

    def _finish(self, key: ImageKey) -> None:
        """Count an image that has finished a phase; with the last one its job leaves the group or ends."""
        job = self._jobs[key.job]
        del job.left[key]
        if job.left or job.group is None:
            return
        job.share.leave(job, job.group)
        if job.later:
            job.phase = job.later.popleft()
            job.begin_phase()
        else:
            self._drop(job)

    def _drop(self, job: Queued) -> None:
        """Forget a job that is in no group."""
        del self._jobs[job.name]
        self._started -= job.started
        self._shares.exit(job.share)

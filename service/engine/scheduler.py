"""The scheduler: the queue of jobs, and which of their images share the next UNet call."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cachetools import LRUCache

from service.engine.job import ImageKey, Shape
from service.engine.row_limits import MAX_GROUPS

PATIENCE = 8  # full calls that may pass over the oldest job; with fewer, large old jobs delay small ones
TOP_PRIORITY = 9


class Position(NamedTuple):
    """A job that has not started. position: 1 is next; ahead: work left before it; own: its own work."""

    job: str
    position: int
    ahead: float
    own: float


@dataclass(slots=True, eq=False)
class Queued:
    """A job with steps to run."""

    name: str
    group: Group
    rows: int  # of one image
    weight: float
    left: dict[ImageKey, int]  # steps left of each unfinished image
    place: tuple[float, int] = (0.0, 0)  # (fair time at which fair sharing would finish the job, its number)
    started: bool = False

    @property
    def work(self) -> float:
        """The work left of the job."""
        return sum(self.left.values()) * self.rows * self.group.row_cost

    def longest(self, count: int) -> list[ImageKey]:
        """The `count` images with the most steps left, so that the images of a job finish together."""
        return sorted(self.left, key=self.left.__getitem__, reverse=True)[:count]


class Group:
    """Jobs that may share a UNet call, and a simulation of fair sharing that sets their order.

    time: fair time, the work that a job of weight 1 would have received by now if all the group's work had
    been shared among its jobs by weight. spent: work done, divided by the weight of the jobs in the queue;
    the group with the smallest value is next.
    """

    def __init__(self, key: Hashable, number: int, row_cost: float, spent: float) -> None:
        self.key = key
        self.number = number
        self.row_cost = row_cost
        self.spent = spent
        self.time = 0.0
        self.queue: list[tuple[float, int, Queued]] = []  # by place
        self.simulated: list[tuple[float, int, float]] = []  # place and weight of its unfinished jobs
        self.weight = 0.0  # of the jobs in the queue
        self.simulated_weight = 0.0  # of the jobs in `simulated`

    @property
    def turn(self) -> tuple[float, int, Group]:
        """The sort key of groups; the smallest is next."""
        return self.spent, self.number, self

    def join(self, job: Queued, number: int, level: float) -> None:
        """Add a new job. The part of `spent` above `level` is from now on shared among more jobs."""
        self.spent = level + (self.spent - level) * self.weight / (self.weight + job.weight)
        self.weight += job.weight
        job.place = self.time + job.work / job.weight, number
        insort(self.queue, (*job.place, job))
        self._share(*job.place, job.weight)

    def leave(self, job: Queued) -> None:
        """Remove a finished job from the queue; in the simulation it may not be finished yet."""
        del self.queue[bisect_left(self.queue, job.place)]
        self.weight -= job.weight

    def cancel(self, job: Queued) -> None:
        """Remove an unfinished job; the simulation counts only the work already done on it."""
        self.leave(job)
        index = bisect_left(self.simulated, job.place)
        if self.simulated[index : index + 1] == [(*job.place, job.weight)]:
            del self.simulated[index]
            self.simulated_weight -= job.weight
            self._share(job.place[0] - job.work / job.weight, job.place[1], job.weight)

    def spend(self, work: float) -> None:
        """Account for work done: advance fair time, and end the simulated jobs that are finished by then."""
        self.spent += work / self.weight
        while self.simulated and work >= (span := (self.simulated[0][0] - self.time) * self.simulated_weight):
            work -= span
            self.time, _, weight = self.simulated.pop(0)
            self.simulated_weight -= weight
        self.time += work / (self.simulated_weight or 1.0)

    def fill(self, limit: int, first: Queued | None = None) -> list[ImageKey]:
        """Images of at most `limit` rows in the order of places, `first` before all others.

        If one image of the first job has more rows, it is picked alone. Only the first 2 * limit jobs are
        searched for one that fills the last gap.
        """
        queue = self.queue[: 2 * limit]
        if first:
            queue = [(*first.place, first), *(entry for entry in queue if entry[2] is not first)]
        if queue[0][2].rows > limit:
            return queue[0][2].longest(1)
        picked: list[ImageKey] = []
        free = limit
        for _, _, job in queue:
            fitting = free // job.rows
            if fitting >= len(job.left):
                picked += job.left
                free -= len(job.left) * job.rows
            elif fitting:
                picked += job.longest(fitting)
                free -= fitting * job.rows
            if not free:
                break
        return picked

    def _share(self, due: float, number: int, weight: float) -> None:
        """Let the simulation work on a job until fair time `due`."""
        if due > self.time:
            insort(self.simulated, (due, number, weight))
            self.simulated_weight += weight


class Scheduler:
    """Admits jobs and picks the images of each UNet call: of one group, within its limit of rows.

    Work is rows * row_cost. Within a group, jobs run in the order in which processor sharing would finish
    them (the fair sojourn protocol, Friedman and Henderson 2003). So jobs finish one after the other instead
    of all late, a small one overtakes a large one, and if a call holds one image, no job finishes later than
    under processor sharing (for larger calls see tests/benchmarks/policies.py). The weight of a job is
    4 ** priority. Groups take turns by work done per job. If all rows of a group fit in a call, all run.

    The bound on waiting: when the work of `patience` full calls (of max_rows rows of its group) was done
    without the oldest job, the next call is of its group, with the oldest job first. So, whatever is admitted
    later and at whatever priority, a job has its last step before the device has done (patience + 2) * S * F
    more work. S: steps, of single images, left at its admission of the job and of all jobs before it. F: work
    of a full call of the group with the highest row_cost.
    """

    def __init__(self, max_rows: int, patience: float = PATIENCE) -> None:
        if max_rows < 2:
            raise ValueError(f"max_rows must be at least 2, not {max_rows}")
        self.max_rows = max_rows
        self.patience = patience
        self._limits: LRUCache[Hashable, int] = LRUCache(MAX_GROUPS)
        self._jobs: OrderedDict[str, Queued] = OrderedDict()  # by admission
        self._groups: dict[Hashable, Group] = {}
        self._turns: list[tuple[float, int, Group]] = []  # of all groups, sorted
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

    def admit(self, job: str, shape: Shape, images: int, rows: int, priority: int = 0) -> None:
        """Queue `images` images of `rows` rows each. Raises ValueError for a job that is queued already."""
        if job in self._jobs:
            raise ValueError(f"job {job} is queued already")
        if min(images, rows) < 1:
            raise ValueError(f"job {job} needs at least 1 image of 1 row, not {images} of {rows}")
        self._numbers += 1
        # A new group starts at the level of the next one: it does not catch up on work done before it came.
        level = self._turns[0][0] if self._turns else 0.0
        if shape.group not in self._groups:
            self._groups[shape.group] = Group(shape.group, self._numbers, shape.row_cost, level)
            insort(self._turns, self._groups[shape.group].turn)
        group = self._groups[shape.group]
        weight = 4.0 ** max(-TOP_PRIORITY, min(priority, TOP_PRIORITY))
        left = {ImageKey(job, index): shape.evaluations for index in range(images)}
        self._jobs[job] = queued = Queued(job, group, rows, weight, left)
        self._withdraw(group)
        group.join(queued, self._numbers, level)
        insort(self._turns, group.turn)

    def pick(self) -> list[ImageKey]:
        """The images of the next UNet call: of one group, within its limit; [] when nothing is left."""
        oldest = self._oldest()
        if oldest is None:
            return []
        overdue = self._passed >= self.patience * self.max_rows * oldest.group.row_cost
        group = oldest.group if overdue else self._turns[0][2]
        rows = min(self.max_rows, self._limits.get(group.key, self.max_rows))
        return group.fill(rows, oldest if overdue else None)

    def advance(self, keys: Iterable[ImageKey]) -> list[ImageKey]:
        """Count one step of each of these images of one group; returns those that have finished."""
        finished, rows, ran, job = [], 0, False, None
        oldest = self._oldest()
        for key in keys:
            job = self._jobs[key[0]]
            job.left[key] = left = job.left[key] - 1
            rows += job.rows
            if left <= 0:
                finished.append(key)
            if job is oldest:
                ran = True
            if not job.started:
                job.started = True
                self._started += 1
        if job:
            work = rows * job.group.row_cost
            self._passed = 0.0 if ran else self._passed + work
            self._withdraw(job.group)
            job.group.spend(work)
            insort(self._turns, job.group.turn)
        for key in finished:
            self._finish(key)
        return finished

    def remove(self, job: str) -> None:
        """Forget a job and free its rows; one that is not queued is left alone."""
        if job in self._jobs:
            queued = self._jobs[job]
            queued.group.cancel(queued)
            self._drop(queued)

    def queue(self) -> list[Position]:
        """Jobs that have not started, in the order in which they would start if no others came."""
        jobs = sorted(self._jobs.values(), key=lambda job: (job.place[0] - job.group.time, job.place[1]))
        positions: list[Position] = []
        ahead = 0.0
        for job in jobs:
            work = job.work
            if not job.started:
                positions.append(Position(job.name, len(positions) + 1, ahead, work))
            ahead += work
        return positions

    def position(self, job: str) -> Position | None:
        """A job's position; None once it has started, or when it is not queued."""
        return next((position for position in self.queue() if position.job == job), None)

    def _oldest(self) -> Queued | None:
        return next(iter(self._jobs.values()), None)

    def _withdraw(self, group: Group) -> None:
        """Remove a group from the turns, before its turn changes or when it has no jobs."""
        del self._turns[bisect_left(self._turns, group.turn)]

    def _finish(self, key: ImageKey) -> None:
        """Forget a finished image, and its job with the last one."""
        job = self._jobs[key.job]
        del job.left[key]
        if not job.left:
            job.group.leave(job)
            self._drop(job)

    def _drop(self, job: Queued) -> None:
        """Forget a job that has left its group, and the group if it was the last."""
        if job is self._oldest():
            self._passed = 0.0
        del self._jobs[job.name]
        self._started -= job.started
        if not job.group.queue:
            del self._groups[job.group.key]
            self._withdraw(job.group)

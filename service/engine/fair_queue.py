"""The queue of a group of a client's jobs, and the order in which fair sharing would finish them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.engine.job import ImageKey, Segment

if TYPE_CHECKING:
    from service.engine.shares import Share


class PhaseCalls:
    """UNet calls of an image that follow each other in one group; their rows may change on the way."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        first = segments[0]
        if any(segment.row_cost != first.row_cost for segment in segments):
            raise ValueError("the row cost of a group must not change")
        self.group = first.group
        self.row_cost = first.row_cost
        self.evaluations = sum(segment.evaluations for segment in segments)
        self.work = sum(segment.work for segment in segments)  # of one image
        self.rows = first.rows if len({segment.rows for segment in segments}) == 1 else None  # if constant
        self._segments = tuple(segments)

    def rows_at(self, left: int) -> int:
        """The rows of the next call of an image with `left` calls left."""
        return self.rows or self.segment_at(left).rows

    def segment_at(self, left: int) -> Segment:
        """The segment of the next call of an image with `left` calls left."""
        later = self.evaluations
        for segment in self._segments:
            later -= segment.evaluations
            if left > later:
                return segment
        raise ValueError("an image without calls has no segment")

    def work_left(self, left: int) -> float:
        """The work of the last `left` calls of an image."""
        if len(self._segments) == 1:
            return left * self._segments[0].call_work
        work = 0.0
        for segment in reversed(self._segments):
            calls = min(left, segment.evaluations)
            work += calls * segment.call_work
            left -= calls
        return work


@dataclass(slots=True, eq=False)
class Queued:
    """A job with steps to run. Its images pass through each phase together.

    group: None between two phases, while its images are prepared for the next one.
    """

    name: str
    number: int  # by admission
    share: Share
    weight: float
    images: int
    phase: PhaseCalls  # the current one, or the one that is prepared
    later: deque[PhaseCalls]  # the phases after it
    group: Group | None = None
    left: dict[ImageKey, int] = field(
        default_factory=dict
    )  # steps left of the unfinished images in this phase
    place: tuple[float, int] = (0.0, 0)  # (fair time at which fair sharing would finish the phase, number)
    started: bool = False

    @property
    def phase_work(self) -> float:
        """The work left of the current phase."""
        return sum(map(self.phase.work_left, self.left.values()))

    @property
    def time_left(self) -> float:
        """Fair time until fair sharing would finish the phase; 0 between two phases."""
        return self.place[0] - self.group.time if self.group else 0.0

    @property
    def work(self) -> float:
        """The work left of the job."""
        return self.phase_work + self.images * sum(phase.work for phase in self.later)

    def begin_phase(self) -> None:
        """All images have all steps of the current phase left."""
        keys = (ImageKey(self.name, index) for index in range(self.images))
        self.left = dict.fromkeys(keys, self.phase.evaluations)

    def longest(self, count: int) -> list[ImageKey]:
        """The `count` images with the most steps left, so that the images of a job finish together."""
        return sorted(self.left, key=self.left.__getitem__, reverse=True)[:count]

    def rows(self, key: ImageKey) -> int:
        """The rows of the image's next call."""
        return self.phase.rows_at(self.left[key])

    def fill(self, free: int) -> tuple[list[ImageKey], int]:
        """Images for `free` rows, those with the most steps left first; and their rows."""
        if rows := self.phase.rows:
            count = free // rows
            picked = list(self.left) if count >= len(self.left) else self.longest(count)
            return picked, rows * len(picked)
        picked, taken = [], 0
        for key in self.longest(len(self.left)):
            if taken + self.rows(key) <= free:
                picked.append(key)
                taken += self.rows(key)
        return picked, taken


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

    @property
    def first(self) -> Queued:
        """The job that is next. There must be one."""
        return self.queue[0][2]

    def join(self, job: Queued, level: float) -> None:
        """Add a job at the start of a phase.

        The part of `spent` above `level` is from now on shared among more jobs.
        """
        self.spent = level + (self.spent - level) * self.weight / (self.weight + job.weight)
        self.weight += job.weight
        job.group = self
        job.place = self.time + job.phase_work / job.weight, job.number
        insort(self.queue, (*job.place, job))
        self._share(*job.place, job.weight)

    def leave(self, job: Queued) -> None:
        """Remove a job at the end of its phase; in the simulation it may not be finished yet."""
        del self.queue[bisect_left(self.queue, job.place)]
        self.weight -= job.weight
        job.group = None

    def cancel(self, job: Queued) -> None:
        """Remove an unfinished job; the simulation counts only the work already done on it."""
        self.leave(job)
        index = bisect_left(self.simulated, job.place)
        if self.simulated[index : index + 1] == [(*job.place, job.weight)]:
            del self.simulated[index]
            self.simulated_weight -= job.weight
            self._share(job.place[0] - job.phase_work / job.weight, job.place[1], job.weight)

    def spend(self, work: float) -> None:
        """Account for work done: advance fair time, and end the simulated jobs that are finished by then."""
        self.spent += work / self.weight
        while self.simulated and work >= (span := (self.simulated[0][0] - self.time) * self.simulated_weight):
            work -= span
            self.time, _, weight = self.simulated.pop(0)
            self.simulated_weight -= weight
        self.time += work / (self.simulated_weight or 1.0)

    def fill(self, free: int, skip: Queued | None = None) -> tuple[list[ImageKey], int]:
        """Images for `free` rows, in the order of places and without those of `skip`; and their rows.

        Only the first 2 * free jobs are searched for one that fills the last gap.
        """
        picked: list[ImageKey] = []
        taken = 0
        for _, _, job in self.queue[: 2 * free]:
            if job is not skip and taken < free:
                keys, rows = job.fill(free - taken)
                picked += keys
                taken += rows
        return picked, taken

    def _share(self, due: float, number: int, weight: float) -> None:
        """Let the simulation work on a job until fair time `due`."""
        if due > self.time:
            insort(self.simulated, (due, number, weight))
            self.simulated_weight += weight

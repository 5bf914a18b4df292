"""What placement.py knows of one replica (a site): its jobs, and the sums over them that it needs often."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from models.sampling.guidance import row_count
from service.engine.job import Job, ModelKey


class Kind(NamedTuple):
    """A model with its LoRAs and an image size: an estimate of the group in which a job shares UNet calls."""

    key: ModelKey
    width: int
    height: int

    @property
    def pixels(self) -> int:
        return self.width * self.height


@dataclass(slots=True, eq=False)
class Placed:
    """A job at a replica.

    steps: left of all its images together, of `total`; rows: of one image in its last UNet call.
    """

    job: Job
    kind: Kind
    steps: float
    total: float
    rows: float
    started: bool = False
    target: int | None = None  # the replica that it moves to


def estimate(job: Job) -> Placed:
    """A new job, before its replica reports the exact number of its steps and rows."""
    steps = job.n * max(1.0, job.steps * job.strength)
    kind = Kind(job.model_key, job.width, job.height)
    return Placed(job, kind, steps, steps, row_count(job.guidance_scale))


class Load(NamedTuple):
    """What is left of the jobs of one kind. rows: over all steps; steps: of the image that has the most."""

    rows: float = 0.0
    steps: float = 0.0

    def with_job(self, placed: Placed) -> Load:
        steps = placed.steps / placed.job.n
        return Load(self.rows + placed.steps * placed.rows, max(self.steps, steps))


class Summary(NamedTuple):
    """Sums over the jobs of a replica.

    loads: of each kind, without the jobs that leave and with those that come; waiting: the jobs that have not
    started and do not move; first: the first of them for each model, in their order.
    """

    loads: dict[Kind, Load]
    waiting: list[Placed]
    first: dict[ModelKey, Placed]


@dataclass(eq=False)
class Site:
    """A replica: its jobs, those that move to it, and the models and LoRA sets that its worker has loaded."""

    jobs: dict[str, Placed] = field(default_factory=dict)
    coming: dict[str, Placed] = field(default_factory=dict)
    holds: frozenset[ModelKey] = frozenset()
    _keys: Counter[ModelKey] = field(default_factory=Counter)  # of `jobs`
    _summary: Summary | None = None

    def add(self, placed: Placed) -> None:
        self.jobs[placed.job.id] = placed
        self._keys[placed.kind.key] += 1
        self.changed()

    def remove(self, job: str) -> None:
        key = self.jobs.pop(job).kind.key
        self._keys[key] -= 1
        if not self._keys[key]:
            del self._keys[key]
        self.changed()

    def changed(self) -> None:
        """Compute the sums again at their next use: a job came, left or changed."""
        self._summary = None

    def has(self, key: ModelKey) -> bool:
        """Whether it has loaded a model with its LoRAs, or will for a job that it has."""
        return key in self.holds or key in self._keys

    @property
    def summary(self) -> Summary:
        if self._summary is None:
            self._summary = self._sum_up()
        return self._summary

    def _sum_up(self) -> Summary:
        loads: dict[Kind, Load] = {}
        waiting: list[Placed] = []
        first: dict[ModelKey, Placed] = {}
        staying = [placed for placed in self.jobs.values() if placed.target is None]
        for placed in (*staying, *self.coming.values()):
            loads[placed.kind] = loads.get(placed.kind, Load()).with_job(placed)
        for placed in staying:
            if not placed.started:
                waiting.append(placed)
                first.setdefault(placed.kind.key, placed)
        return Summary(loads, waiting, first)

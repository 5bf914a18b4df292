"""The queue: which rows share the next UNet call. Pure Python: no torch, no clock, no threads."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from service.job import ImageKey, Shape


@dataclass
class Image:
    """One image on its way through its evaluations."""

    key: ImageKey
    rows: int
    left: int  # evaluations still to run
    rank: tuple[int, int, int]  # smaller runs sooner: priority, arrival, index


class Group:
    """Images that may share a UNet call, and the work that the group has had."""

    def __init__(self, row_cost: float, work: float) -> None:
        self.row_cost = row_cost
        self.work = work
        self.images: dict[ImageKey, Image] = {}

    @property
    def rank(self) -> tuple[int, float]:
        """Smaller runs sooner: the most urgent image, then the least work so far."""
        return (min(image.rank[0] for image in self.images.values()), self.work)


class Scheduler:
    """Admits jobs and deals out UNet calls of at most max_rows rows, image by image.

    Within a group the older job goes first and keeps its place until it ends, so that jobs finish rather
    than all crawl; a higher priority overtakes at the next step. Groups take turns by work done.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows < 2:
            raise ValueError(f"max_rows must be at least 2, not {max_rows}")
        self.max_rows = max_rows
        self._groups: dict[Hashable, Group] = {}
        self._of: dict[str, Hashable] = {}  # job -> group
        self._arrivals = 0

    def __len__(self) -> int:
        """Jobs with evaluations still to run."""
        return len(self._of)

    def admit(self, job: str, shape: Shape, images: int, rows: int, priority: int = 0) -> None:
        """Queue `images` images of `rows` rows each. Raises ValueError for a job that is queued already."""
        if job in self._of:
            raise ValueError(f"job {job} is queued already")
        if shape.group not in self._groups:
            self._groups[shape.group] = Group(shape.row_cost, self._least_work())
        group = self._groups[shape.group]
        self._of[job] = shape.group
        self._arrivals += 1
        for index in range(images):
            key = ImageKey(job, index)
            group.images[key] = Image(key, rows, shape.evaluations, (-priority, self._arrivals, index))

    def pick(self) -> list[ImageKey]:
        """The images of the next UNet call: of one group, at most max_rows rows; [] when nothing is left."""
        if not self._groups:
            return []
        group = min(self._groups.values(), key=lambda g: g.rank)
        picked, free = [], self.max_rows
        for image in sorted(group.images.values(), key=lambda i: i.rank):
            if image.rows <= free:
                picked.append(image.key)
                free -= image.rows
        return picked

    def advance(self, keys: Iterable[ImageKey]) -> list[ImageKey]:
        """Count one evaluation of each image; the ones that have no more leave and are returned."""
        finished = []
        for key in keys:
            group = self._groups[self._of[key.job]]
            image = group.images[key]
            image.left -= 1
            group.work += image.rows * group.row_cost
            if image.left <= 0:
                finished.append(key)
        for key in finished:
            self._forget([key])
        return finished

    def remove(self, job: str) -> None:
        """Forget a job and free its rows; one that is not queued is left alone."""
        if job in self._of:
            images = self._groups[self._of[job]].images
            self._forget([key for key in images if key.job == job])

    def _forget(self, keys: list[ImageKey]) -> None:
        """Drop images of one job, then its job and group where they have none left."""
        job, group = keys[0].job, self._of[keys[0].job]
        images = self._groups[group].images
        for key in keys:
            del images[key]
        if not any(key.job == job for key in images):
            del self._of[job]
        if not images:
            del self._groups[group]

    def _least_work(self) -> float:
        """Where a new group starts, so that it neither waits for old debts nor runs ahead of them."""
        return min((group.work for group in self._groups.values()), default=0.0)

"""A job: one accepted request, frozen; and what comes back of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

MAX_SEED = 2**53 - 1  # the largest whole number that every JSON client can hold


class ImageKey(NamedTuple):
    """Image `index` of a job."""

    job: str
    index: int


@dataclass(frozen=True)
class Job:
    """Everything that decides the job's pictures, and its place in the queue. Image i has seed + i."""

    id: str
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    n: int
    sampler: str
    eta: float
    priority: int = 0

    @property
    def needs_both(self) -> bool:
        """Whether guidance compares two predictions; at 0 and 1 one of them says it all."""
        return self.guidance_scale not in (0.0, 1.0)

    @property
    def rows(self) -> int:
        """Rows that one image costs in a UNet call."""
        return 2 if self.needs_both else 1

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a message between processes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Job:
        """The inverse of to_dict."""
        return cls(**d)


@dataclass(frozen=True)
class Shape:
    """What the scheduler needs to know of a job.

    group: jobs with an equal one may share a UNet call; evaluations: UNet calls of each image;
    row_cost: work of one row, in any unit that all groups share.
    """

    group: Hashable
    evaluations: int
    row_cost: float


@dataclass(frozen=True)
class Started:
    """The job's first rows are about to run."""

    job: str


@dataclass(frozen=True)
class Stepped:
    """One UNet call is over. rows: used; padded: run; running and waiting: jobs begun and not."""

    rows: int
    padded: int
    images: int
    seconds: float
    running: int
    waiting: int


@dataclass(frozen=True)
class Done:
    """The job's pictures, each height x width x 3 bytes; seconds of each part."""

    job: str
    pictures: tuple[bytes, ...]
    warnings: tuple[str, ...]
    queue: float
    denoise: float
    decode: float


@dataclass(frozen=True)
class Failed:
    """The job has no pictures; code: of errors.TABLE."""

    job: str
    code: str


@dataclass(frozen=True)
class Cancelled:
    """The job was given up at the client's wish."""

    job: str


Event = Started | Stepped | Done | Failed | Cancelled

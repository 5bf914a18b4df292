"""Facts about the model in a single file that its tensors do not show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.spec import Prediction, ScheduleSpec


@dataclass(frozen=True)
class Hints:
    """Facts from a file next to the weights; None: the file does not contain this fact.

    Facts from tensors take precedence over hints, and hints over the tables of families.
    """

    origin: Path | None = None  # the file that the hints come from
    family: str | None = None  # a key of ldm.FAMILIES
    image_size: int | None = None  # pixels along a side
    heads: int | tuple[int, ...] | None = None  # attention heads of every level, or of each level
    head_width: int | None = None  # channels of a head, as an alternative to the number of heads
    scale_factor: float | None = None
    schedule: ScheduleSpec | None = None
    prediction: Prediction | None = None

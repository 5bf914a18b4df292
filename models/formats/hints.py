"""Facts about a single file's model that its tensors do not show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.spec import Prediction, ScheduleSpec


@dataclass(frozen=True)
class Hints:
    """What a file next to the weights says about the model; None: it does not say.

    Facts that the tensors show take precedence over hints, and hints over the table of known families.
    """

    origin: Path | None = None  # the file that the hints come from
    family: str | None = None  # a key of ldm.FAMILIES
    image_size: int | None = None  # pixels along a side
    heads: int | tuple[int, ...] | None = None  # attention heads of every level, or of each level
    head_width: int | None = None  # channels of a head, as an alternative to the number of heads
    scale_factor: float | None = None
    schedule: ScheduleSpec | None = None
    prediction: Prediction | None = None

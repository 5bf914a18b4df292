"""A job: one accepted request, frozen; and what comes back of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

from models.conditioning.boxes import Box
from models.spec import Spacing

MAX_SEED = 2**53 - 1  # the largest whole number that every JSON client can hold


class Network(NamedTuple):
    """What a job runs on: a model, and the LoRAs merged into it, sorted, each at a weight that is not 0."""

    model: str
    loras: tuple[tuple[str, float], ...] = ()


class ImageKey(NamedTuple):
    """Image `index` of a job."""

    job: str
    index: int


@dataclass(frozen=True)
class Job:
    """Everything that decides the job's pictures, and its place in the queue. Image i has seed + i.

    image: height x width x 3 bytes that the run starts from, none for a run from noise alone; with a scale,
    the picture to enlarge by it, height / scale x width / scale x 3 bytes; mask: height x
    width bytes, 255 where that picture is painted anew and 0 where it stays, none for everywhere; regions: of
    every ModelSpec.label_cell pixels, row by row, two bytes: the number of a label counted from 1, or 0; none
    for none. boxes: as in models.boxes, for a model that reads them.
    """

    BLOBS: ClassVar[tuple[str, ...]] = ("image", "mask", "regions")  # go beside a message's header, not in it

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
    strength: float = 1.0  # of a run from a picture: the share of the steps that it takes
    image: bytes = b""
    mask: bytes = b""
    regions: bytes = b""
    scale: int = 0  # by which image is enlarged; 0: it is not
    noise_level: int = 0  # of the noise that is put on image then
    preview_every: int = 0  # steps of an image between two previews of it; 0: none
    preview_decoded: bool = False  # previews through D, at full size, rather than by a projection
    class_label: int | None = None  # counted from 0; for a model that reads prompts, prompt is its name
    boxes: tuple[Box, ...] = ()
    spacing: Spacing | None = None  # of the timesteps; None: the sampler's own
    long_prompts: str = "cut"  # or "chunk": as many contexts side by side as they fill
    prompt_weights: bool = False  # prompts have the grammar of models.prompts
    loras: tuple[tuple[str, float], ...] = ()  # as in Network

    @property
    def network(self) -> Network:
        """Jobs with another may not share its UNet calls."""
        return Network(self.model, self.loras)

    @property
    def task(self) -> str:
        """As in ModelSpec.tasks."""
        if self.scale:
            return "upscaling"
        if self.mask:
            return "inpainting"
        if self.image:
            return "image-to-image"
        if self.regions or self.boxes:
            return "layout-to-image"
        if self.class_label is not None:
            return "class-to-image"
        return "text-to-image" if self.prompt else "unconditional"

    @property
    def needs_both(self) -> bool:
        """Whether guidance compares two predictions; at 0 and 1 one of them says it all."""
        return self.guidance_scale not in (0.0, 1.0)

    @property
    def rows(self) -> int:
        """Rows that one image costs in a UNet call."""
        return 2 if self.needs_both else 1

    def to_message(self) -> tuple[dict[str, Any], tuple[bytes, ...]]:
        """Plain values and blobs, for a message between processes."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.BLOBS}
        return plain, tuple(getattr(self, name) for name in self.BLOBS)

    @classmethod
    def from_message(cls, plain: dict[str, Any], blobs: tuple[bytes, ...]) -> Job:
        """The inverse of to_message."""
        boxes, loras = (tuple(Box(*box) for box in plain["boxes"]), tuple(map(tuple, plain["loras"])))
        plain = plain | {"boxes": boxes, "loras": loras}
        return cls(**plain, **dict(zip(cls.BLOBS, blobs, strict=True)))


@dataclass(frozen=True)
class Shape:
    """What the scheduler needs to know of a job.

    group: jobs with an equal one may share a UNet call; evaluations: UNet calls of each image;
    row_cost: work of one row, in any unit that all groups share; parts: tiles that each image is made of,
    which are queued as images are.
    """

    group: Hashable
    evaluations: int
    row_cost: float
    parts: int = 1


@dataclass(frozen=True)
class Waiting:
    """Where the jobs that have not begun stand: (job, position from 1, seconds until it ends, if known)."""

    places: tuple[tuple[str, int, float | None], ...]


@dataclass(frozen=True)
class Started:
    """The job's first rows are about to run; steps: of all its images together."""

    job: str
    steps: int


@dataclass(frozen=True)
class Stepped:
    """One UNet call is over. rows: used; padded: run; running and waiting: jobs begun and not.

    jobs: of each job in the call, the steps done so far, of all its images together.
    """

    rows: int
    padded: int
    images: int
    seconds: float
    running: int
    waiting: int
    jobs: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Decoded:
    """One picture is through D, which took so long."""

    seconds: float


@dataclass(frozen=True)
class Trouble:
    """Something went wrong, and was mended or not: memory ran out, or numbers were none."""

    kind: Literal["out_of_memory", "non_finite"]
    stage: Literal["load", "start", "step", "decode"]


@dataclass(frozen=True)
class Previewed:
    """What image `index` looks like after `step` steps: height x width x 3 bytes, maybe at a smaller size."""

    job: str
    index: int
    step: int
    width: int
    height: int
    pixels: bytes


@dataclass(frozen=True)
class Done:
    """The job's pictures, each height x width x 3 bytes, or the tiles of each in turn; seconds of parts."""

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


Event = Waiting | Started | Stepped | Decoded | Trouble | Previewed | Done | Failed | Cancelled

"""A job: one accepted request, frozen; and what comes back of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from models.conditioning.boxes import Box
from models.sampling.guidance import row_count
from models.spec import Spacing

MAX_SEED = 2**53 - 1  # the largest whole number that every JSON client can hold


LatentFill = Literal["image", "noise", "zeros"]


class ModelKey(NamedTuple):
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
    loras: tuple[tuple[str, float], ...] = ()  # as in ModelKey
    latent_fill: LatentFill = "image"  # what masked latent cells start from, before noise is added

    @property
    def model_key(self) -> ModelKey:
        """Jobs with another may not share its UNet calls."""
        return ModelKey(self.model, self.loras)

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
    def rows(self) -> int:
        """Rows that one image costs in a UNet call: 2 with guidance, else 1."""
        return row_count(self.guidance_scale)


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

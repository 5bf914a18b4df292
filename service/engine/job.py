"""A job: one accepted request, as the engine and the device see it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal, NamedTuple

from models.conditioning.boxes import Box
from models.sampling.guidance import StepRows, cfg_rows, edit_rows
from models.spec import Spacing

MAX_SEED = 2**64 - 1  # the largest seed of a random number generator

LatentFill = Literal["image", "noise", "zeros"]
Decoder = Literal["full", "tiny"]
Tiling = Literal["none", "x", "y", "both"]
PromptSyntax = Literal["plain", "a1111"]
ControlMode = Literal["balanced", "prompt", "control"]


class LoraWeights(NamedTuple):
    """The name of a LoRA, and its weights for the UNet and for the text encoders."""

    name: str
    unet: float
    text: float


class ModelKey(NamedTuple):
    """A model and the LoRAs merged into it, sorted by name, without LoRAs whose weights are both 0."""

    model: str
    loras: tuple[LoraWeights, ...] = ()


class AdapterKey(NamedTuple):
    """A control or a reference adapter, for a model."""

    kind: Literal["control", "reference_adapter"]
    name: str
    model: str


WeightsKey = ModelKey | AdapterKey  # what a job needs in memory


class ImageKey(NamedTuple):
    """One image of a job, by its index (its seed is the job's seed + index); when upscaling, one tile."""

    job: str
    image: int


class Variation(NamedTuple):
    """Noise of another seed, which is mixed into the noise that the images start from."""

    seed: int  # of image 0; image i takes seed + i
    strength: float  # above 0; 1: the other seed's noise alone


class FeatureCache(NamedTuple):
    """Deep features of the UNet are computed at every interval-th call; see models.networks.deep_features."""

    interval: int
    branch: int


@dataclass(frozen=True)
class JobControl:
    """A control of a job's images. image: height x width x 3 bytes, of the size of the job's images.

    scale: factor of what it adds to the UNet; start, end: the part of the run in which it acts; mode: as in
    the request; type: number of the control type, of a network for several; masked: the pixels to repaint are
    marked in its image.
    """

    name: str
    image: bytes
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: ControlMode = "balanced"
    type: int = 0
    masked: bool = False


@dataclass(frozen=True)
class JobReference:
    """A reference image of a job. image: height x width x 3 bytes; the other fields are as in JobControl."""

    adapter: str
    image: bytes
    width: int
    height: int
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Refiner:
    """Another model that makes the last steps of a run, from the fraction `switch_at` of its steps on."""

    model: str
    switch_at: float


@dataclass(frozen=True)
class Hires:
    """A second pass, image-to-image from the enlarged image of the first.

    width, height: of the finished image; upscaler: one of models.upscalers, or with `model` the name of that
    upscaling model. The other fields are as in Job.
    """

    width: int
    height: int
    steps: int
    strength: float
    upscaler: str
    prompt: str
    negative_prompt: str
    model: bool = False


@dataclass(frozen=True)
class Job:
    """The parameters of a job's images, and what decides when it runs. Image i has the seed image_seed(i).

    image: height x width x 3 bytes, the input of image-to-image and inpainting; for upscaling the image to
        enlarge, height / scale x width / scale x 3 bytes; empty for runs from noise.
    mask: height x width bytes, 255 where the image is repainted, 0 where it stays; empty for other tasks.
    regions: a segmentation map, row by row: for each cell of ModelSpec.label_cell x label_cell pixels the
        number of a label in two bytes, counted from 1, or 0 for no label; empty for models without such maps.
    boxes: as in models.conditioning.boxes; empty for models without boxes.
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
    strength: float = 1.0  # of image-to-image: the share of the steps that is run
    image: bytes = b""
    mask: bytes = b""
    regions: bytes = b""
    scale: int = 0  # factor of upscaling; 0 for other tasks
    noise_level: int = 0  # of the noise that upscaling adds to the image first
    preview_every: int = 0  # steps of an image between two previews; 0: no previews
    preview_decoded: bool = False  # previews come from the VAE decoder at full size, not from a projection
    class_label: int | None = None  # counted from 0; `prompt` is its name
    boxes: tuple[Box, ...] = ()
    spacing: Spacing | None = None  # of the timesteps; None for the sampler's own
    long_prompts: str = "cut"  # or "chunk": a long prompt becomes several chunks of context
    prompt_syntax: PromptSyntax = "plain"  # a1111: as in models.conditioning.prompt_schedule, with weights
    prompt_weights: bool = False  # whether prompts are in the syntax of models.conditioning.prompts
    loras: tuple[LoraWeights, ...] = ()  # as in ModelKey
    image_guidance: float | None = None  # scale of guidance by the image to edit; None: the model edits none
    embedded_guidance: float = 1.0  # the guidance scale that the UNet takes as an input, if it takes one
    latent_fill: LatentFill = "image"  # initial content of masked latent cells, before noise is added
    keeps_pixels: bool = True  # the finished image has the input image's pixels outside the mask
    variation: Variation | None = None
    decoder: Decoder = "full"  # tiny: the tiny VAE that was given for the model
    tiling: Tiling = "none"  # axes along which the images repeat without a seam
    clip_skip: int = 1  # the text encoders leave out clip_skip - 1 layers more than the model does
    controls: tuple[JobControl, ...] = ()
    references: tuple[JobReference, ...] = ()
    guidance_start: float = 0.0  # guidance acts between these fractions of the run
    guidance_end: float = 1.0
    guidance_rescale: float = 0.0  # see models.sampling.guidance.rescale
    refiner: Refiner | None = None
    hires: Hires | None = None
    feature_cache: FeatureCache | None = None
    client: str = ""  # whose it is; clients share the device by weight
    share: float = 1.0  # the client's weight

    @property
    def guided_rows(self) -> StepRows:
        """The rows of a UNet call in which guidance acts."""
        if self.image_guidance is None:
            return cfg_rows(self.guidance_scale)
        return edit_rows(self.guidance_scale, self.image_guidance)

    def image_seed(self, image: int) -> int:
        """The seed of an image's generator: with a variation all images have the same."""
        return self.seed + (0 if self.variation else image)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the finished images."""
        return (self.hires.width, self.hires.height) if self.hires else (self.width, self.height)

    @property
    def model_key(self) -> ModelKey:
        """Jobs with different keys cannot share a UNet call."""
        return ModelKey(self.model, self.loras)

    @property
    def model_keys(self) -> tuple[ModelKey, ...]:
        """All models that the job runs on, without repetitions; the first one is that of its first call."""
        names = [self.hires.upscaler] if self.hires and self.hires.model else []
        names += [self.refiner.model] if self.refiner else []
        return (self.model_key, *map(ModelKey, names))

    @property
    def weights_keys(self) -> tuple[WeightsKey, ...]:
        """All models, controls and reference adapters of the job, without repetitions; models are first."""
        controls = (AdapterKey("control", control.name, self.model) for control in self.controls)
        references = (AdapterKey("reference_adapter", each.adapter, self.model) for each in self.references)
        return tuple(dict.fromkeys((*self.model_keys, *controls, *references)))


@dataclass(frozen=True)
class Segment:
    """Consecutive UNet calls of an image that cost the same.

    group: images with equal groups may share a UNet call; rows: of the image in each of these calls;
    evaluations: the number of calls; row_cost: work of one row, in any unit that all groups share, and the
    same in all segments of a group; extra_cost: work of a call beside its rows: of control networks, less
    what a feature cache saves on average.
    """

    group: Hashable
    rows: int
    evaluations: int
    row_cost: float
    extra_cost: float = 0.0

    def __post_init__(self) -> None:
        if min(self.rows, self.evaluations) < 1:
            raise ValueError(
                f"a segment needs at least 1 call of 1 row, not {self.evaluations} of {self.rows}"
            )

    @property
    def call_work(self) -> float:
        """The work of one of these calls of one image."""
        return self.rows * self.row_cost + self.extra_cost

    @property
    def work(self) -> float:
        """The work of these calls of one image."""
        return self.evaluations * self.call_work


@dataclass(frozen=True)
class Shape:
    """The UNet calls of a job, as the scheduler needs to know them.

    segments: of each image, in order, at least one; parts: tiles of each image, which are queued as images
    are.
    """

    segments: tuple[Segment, ...]
    parts: int = 1

    @cached_property
    def phases(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments of each phase: consecutive segments of one group."""
        return tuple(tuple(own) for _, own in groupby(self.segments, key=lambda segment: segment.group))

    @cached_property
    def evaluations(self) -> int:
        """UNet calls of each image."""
        return sum(segment.evaluations for segment in self.segments)

    def segment(self, done: int) -> Segment:
        """The segment of the next UNet call of an image that has had `done` calls."""
        for segment in self.segments:
            if done < segment.evaluations:
                return segment
            done -= segment.evaluations
        raise ValueError("an image has no call after its last one")

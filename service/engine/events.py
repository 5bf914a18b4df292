"""What the engine reports while it works, for the process that gave it the jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from service.engine.job import ModelKey

Stage = Literal["load", "start", "step", "prepare", "decode"]
IncidentKind = Literal["out_of_memory", "non_finite"]


class QueuePosition(NamedTuple):
    """A job that has not started. position: 1 is next; seconds: estimate until it is finished, if known."""

    job: str
    position: int
    seconds: float | None


class JobSteps(NamedTuple):
    """A job in a UNet call. steps: done so far, over all its images; rows: that it had in this call."""

    job: str
    steps: int
    rows: int


@dataclass(frozen=True)
class QueuePositions:
    """The positions of all jobs that have not started."""

    positions: tuple[QueuePosition, ...]


@dataclass(frozen=True)
class Started:
    """The job's first UNet call is about to run. steps: of all its images together."""

    job: str
    steps: int


@dataclass(frozen=True)
class Stepped:
    """One UNet call has finished.

    rows: that belong to images; padded: rows of the call with its padding; running, waiting: number of jobs
    that have and have not started; jobs: the jobs in the call.
    """

    rows: int
    padded: int
    images: int
    seconds: float
    running: int
    waiting: int
    jobs: tuple[JobSteps, ...]


@dataclass(frozen=True)
class Decoded:
    """The VAE has decoded one image, or one tile of an image."""

    seconds: float


@dataclass(frozen=True)
class Incident:
    """Memory ran out, or NaN or Inf values were found; a retry may have helped."""

    kind: IncidentKind
    stage: Stage


@dataclass(frozen=True)
class Previewed:
    """What image `index` of a job looks like after `step` steps.

    pixels: height x width x 3 bytes; width and height may be smaller than the image's.
    """

    job: str
    index: int
    step: int
    width: int
    height: int
    pixels: bytes


@dataclass(frozen=True)
class Done:
    """The job has finished.

    images: each height x width x 3 bytes; for an upscaling job the tiles of its first image, then those of
    its second, and so on. queue, denoise, decode: seconds that the job spent in each part; start: the
    seconds of `denoise` in which its contexts and initial latents were made.
    """

    job: str
    images: tuple[bytes, ...]
    warnings: tuple[str, ...]
    queue: float
    denoise: float
    decode: float
    start: float = 0.0


@dataclass(frozen=True)
class Failed:
    """The job has failed. code: one of service.errors.TABLE."""

    job: str
    code: str


@dataclass(frozen=True)
class Cancelled:
    """The job was withdrawn by its client."""

    job: str


@dataclass(frozen=True)
class Withdrawn:
    """The job has not started, and was given back: it will not run here."""

    job: str


@dataclass(frozen=True)
class Loaded:
    """A model was loaded, or LoRAs were merged into it, which took noticeable time."""

    key: ModelKey
    seconds: float


class LoadedModel(NamedTuple):
    """A loaded model.

    bytes: of its weights; dtype: of its UNet's weights, as torch calls it; backend: the library that runs its
    UNet and decoder.
    """

    name: str
    bytes: int
    dtype: str
    backend: str


@dataclass(frozen=True)
class LoadedModels:
    """The loaded models after a change."""

    models: tuple[LoadedModel, ...]


@dataclass(frozen=True)
class Overflowed:
    """A model's values in float16 were too often NaN or Inf; its new jobs run in bfloat16."""

    model: str


@dataclass(frozen=True)
class CallEnded:
    """A call to load or unload a model has ended. code: of an error, or None."""

    call: str
    code: str | None


Event = (
    QueuePositions
    | Loaded
    | Started
    | Stepped
    | Decoded
    | Incident
    | Previewed
    | Done
    | Failed
    | Cancelled
    | Withdrawn
    | LoadedModels
    | Overflowed
    | CallEnded
)

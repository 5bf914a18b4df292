"""The engine's record of one job."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from service.engine.job import Job, Segment, Shape, WeightsKey


@dataclass
class JobRun:
    """A job and its progress. The times *_at are readings of the engine's clock."""

    job: Job
    received_at: float
    shape: Shape
    full_precision: bool = False  # the job runs again, in float32
    no_room_with: frozenset[WeightsKey] = frozenset()  # busy models that left no memory for the job's model
    admitted: bool = False  # the scheduler has it
    started: bool = False  # the runner has its latents
    announced: bool = False  # its Started event was sent
    interrupted: bool = False  # it takes no more steps
    steps: dict[int, int] = field(default_factory=dict)  # done of each image, in this run
    most_steps: dict[int, int] = field(default_factory=dict)  # done of each image, in any run
    prepared: set[int] = field(default_factory=set)  # images that are ready for the job's next phase
    started_at: float = 0.0
    denoised_at: float = 0.0
    start_seconds: float = 0.0  # in which its contexts and initial latents were made
    warnings: tuple[str, ...] = ()
    images: dict[int, bytes] = field(default_factory=dict)

    @property
    def parts(self) -> int:
        """The number of images, or of tiles that they are made of."""
        return self.job.n * self.shape.parts

    @property
    def groups(self) -> tuple[Hashable, ...]:
        """The group of each phase."""
        return tuple(phase[0].group for phase in self.shape.phases)

    @property
    def work(self) -> float:
        """All the work of the job, as the scheduler counts it."""
        return self.parts * sum(segment.work for segment in self.shape.segments)

    def segment(self, image: int) -> Segment:
        """The segment of the image's next UNet call."""
        return self.shape.segment(self.steps.get(image, 0))

    def is_denoised(self, image: int) -> bool:
        """Whether the image takes no more steps."""
        return self.interrupted or self.steps.get(image, 0) == self.shape.evaluations

    def count_step(self, image: int) -> bool:
        """Count one step of an image; returns whether a preview of it is due.

        Previews are not repeated when the job runs again.
        """
        self.steps[image] = step = self.steps.get(image, 0) + 1
        is_new = step > self.most_steps.get(image, 0)
        if is_new:
            self.most_steps[image] = step
        every = self.job.preview_every
        return is_new and every > 0 and step % every == 0 and step < self.shape.evaluations

    def start_over(self) -> None:
        """Reset the steps and images of this run, but not what was announced to clients."""
        self.started = self.interrupted = False
        self.steps, self.images, self.prepared = {}, {}, set()

"""What the engine needs from the device that runs the networks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from service.engine.job import ImageKey, Job, ModelKey, Shape
from service.engine.row_limits import MemoryUse


@dataclass(frozen=True)
class Call:
    """The result of one UNet call.

    rows: that were run, padding included; non_finite: jobs with NaN or Inf values; memory: what the call
    took, if that was measured. unfinished: the device still works on the call; non_finite and seconds (None:
    unknown) are then those of the call before.
    """

    rows: int
    non_finite: tuple[str, ...] = ()
    memory: MemoryUse | None = None
    unfinished: bool = False
    seconds: float | None = None


class Preview(NamedTuple):
    """pixels: height x width x 3 bytes."""

    width: int
    height: int
    pixels: bytes


class Runner(Protocol):
    """Runs jobs on a device.

    Every method may raise an exception, OutOfMemory and NonFinite among them; the images that it was about
    are then as they were before.
    """

    @property
    def buckets(self) -> tuple[int, ...]:
        """The row counts that calls are padded to, in ascending order."""

    def shape(self, job: Job, full_precision: bool = False) -> Shape:
        """What the scheduler needs to know about a job. It may change when load() has loaded the job's model.

        full_precision: about a run in float32.
        """

    def load(self, job: Job, busy: Collection[ModelKey]) -> bool:
        """Load what the job runs on, unless it is loaded; False if busy models leave no room for it."""

    def make_room(self, busy: Collection[ModelKey]) -> None:
        """Free all memory that neither running jobs nor busy models need."""

    def start(self, job: Job, full_precision: bool = False) -> tuple[str, ...]:
        """Make the initial latents of a job's images, again if it has been started; returns warnings."""

    def step(self, keys: Sequence[ImageKey]) -> Call:
        """One UNet call: one step of each of these images of one group."""

    def settle(self) -> tuple[str, ...]:
        """Wait for the device; returns the jobs with NaN or Inf values that no call has returned."""

    def preview(self, key: ImageKey) -> Preview:
        """What an image looks like at its current step."""

    def finish(self, key: ImageKey) -> bytes:
        """Decode an image after its last step: height x width x 3 bytes."""

    def discard(self, job: str) -> None:
        """Forget everything about a job."""

"""What the engine needs from the device that runs the networks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from service.engine.job import ImageKey, Job, Shape, WeightsKey
from service.engine.row_limits import MemoryUse


def padded_size(rows: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending sizes that has room for so many rows; `rows` itself if none has."""
    return next((size for size in sizes if size >= rows), rows)


@dataclass(frozen=True)
class Call:
    """The result of one UNet call.

    rows: rows of the call, padding included; non_finite: jobs with NaN or Inf values; memory: the call's use
    of memory, if that was measured. unfinished: the device still works on the call; then non_finite and
    seconds (None: unknown) belong to the previous call. slow: the call chose kernels, compiled or was
    recorded, so that its duration says nothing about the next ones.
    """

    rows: int
    non_finite: tuple[str, ...] = ()
    memory: MemoryUse | None = None
    unfinished: bool = False
    seconds: float | None = None
    slow: bool = False


class DecodedImage(NamedTuple):
    """An image whose decoding has ended. result: height x width x 3 bytes, or why there are none."""

    key: ImageKey
    result: bytes | Exception
    seconds: float


class Preview(NamedTuple):
    """A preview of an image. pixels: height x width x 3 bytes."""

    width: int
    height: int
    pixels: bytes


class Runner(Protocol):
    """Runs jobs on a device.

    Every method may raise an exception, such as OutOfMemory or NonFinite, and leaves the images then as they
    were before the call.
    """

    @property
    def buckets(self) -> tuple[int, ...]:
        """The row counts that calls are padded to, in ascending order."""

    def shape(self, job: Job, full_precision: bool = False) -> Shape:
        """The shape of a job, or with full_precision of its run in float32.

        It may be another one after load() has loaded the job's model.
        """

    def load(self, job: Job, busy: Collection[WeightsKey]) -> bool:
        """Load the job's models and LoRAs if necessary; False if busy models leave no room for them.

        Raises OutOfMemory if the job's models do not fit in memory together, although no others are busy.
        """

    def load_models(self, keys: Sequence[WeightsKey], busy: Collection[WeightsKey]) -> bool:
        """The same for models without a job."""

    def unload_model(self, model: str) -> None:
        """Unload a model that no job uses; one that is not loaded is left alone."""

    def install(self, contents: Any) -> tuple[str, ...]:
        """Serve other models from now on; returns models that should be unloaded when no job uses them.

        contents: as the device's code makes it from a catalogue.
        """

    def make_room(self, busy: Collection[WeightsKey]) -> None:
        """Free all memory that neither running jobs nor busy models need."""

    def start(self, job: Job, full_precision: bool = False) -> tuple[str, ...]:
        """Make the initial latents of a job's images, also of a job that starts again; returns warnings."""

    def step(self, keys: Sequence[ImageKey]) -> Call:
        """One UNet call: one step of each of these images of one group."""

    def settle(self) -> tuple[str, ...]:
        """Wait for the device; returns jobs with NaN or Inf values that no Call has reported yet."""

    def count_overflow(self, job: Job) -> bool:
        """Count a job that succeeded only in float32. Returns whether its model runs in bfloat16 now."""

    def prepare(self, key: ImageKey) -> bool:
        """Do one bounded piece of work to make an image ready for its next phase; whether it is ready now.

        The image has had the last step of a phase.
        """

    def preview(self, key: ImageKey) -> Preview:
        """What an image looks like at its current step."""

    @property
    def decode_batch(self) -> int:
        """The most images of one call of decode()."""

    def decode(self, keys: Sequence[ImageKey]) -> None:
        """Start to decode images, usually after their last step: all of them, or none and an exception.

        This does not wait for the device: decoded() returns the images.
        """

    def decoded(self, wait: bool) -> Sequence[DecodedImage]:
        """The images whose decoding has ended; with `wait`, of all that were started before the last step().

        Without steps since then, settle() must be called first. Images of discarded jobs are left out.
        """

    def discard(self, job: str) -> None:
        """Forget everything about a job."""

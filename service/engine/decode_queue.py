"""The queue of images to decode, and how much of the device's time decoding may take."""

from __future__ import annotations

from collections import deque

from service.engine.job import ImageKey


class DecodeQueue:
    """Denoised images in the order of arrival, and a time credit for decoding them.

    Every UNet call adds its duration to the credit, and every decoding uses its own duration up. So decoding
    takes about as much time as UNet calls: running jobs slow down to half speed at worst, and an image waits
    for a step or two. The last image of a turn may overdraw the credit.
    """

    def __init__(self) -> None:
        self._latents: deque[tuple[ImageKey, int]] = deque()
        self._popped = 0
        self._credit = 0.0  # seconds of UNet calls minus seconds of decoding

    def __len__(self) -> int:
        return len(self._latents)

    def add(self, key: ImageKey, job_size: int) -> None:
        """Append an image; job_size: the number of images of its job."""
        self._latents.append((key, job_size))

    def images_of(self, job: str) -> set[int]:
        """The indices of a job's images in the queue."""
        return {key.image for key, _ in self._latents if key.job == job}

    def discard(self, job: str) -> None:
        """Remove a job's images."""
        self._latents = deque(entry for entry in self._latents if entry[0].job != job)

    def charge(self, seconds: float) -> None:
        """Reduce the credit by the time that decoding takes."""
        self._credit -= seconds

    def begin_turn(self, step_seconds: float | None) -> None:
        """Add the time of this turn's UNet call to the credit; None: the turn had no call."""
        self._credit += step_seconds or 0.0

    def may_decode(self, decoded: int, step_seconds: float | None) -> bool:
        """Whether to decode another image in this turn, in which `decoded` images were decoded already.

        In a turn without a UNet call the first image is decoded whatever the credit.
        """
        return bool(self._latents) and (self._credit > 0 or (step_seconds is None and not decoded))

    def end_turn(self, step_seconds: float | None) -> None:
        """Reset the credit if nothing is left to decode, or if no UNet call competes for the device."""
        if not self._latents or step_seconds is None:
            self._credit = 0.0

    def pop(self) -> ImageKey:
        """Remove the next image: alternately one of the smallest job, and the one that has waited longest."""
        self._popped += 1
        entry = min(self._latents, key=lambda entry: entry[1]) if self._popped % 2 else self._latents[0]
        self._latents.remove(entry)
        return entry[0]

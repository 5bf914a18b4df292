"""Images that wait to be decoded, and how much of the device's time decoding may take."""

from __future__ import annotations

from collections import deque

from service.engine.job import ImageKey


class DecodeQueue:
    """Finished latents, and the time credit of decoding.

    Decoding gets about as much time as UNet calls. So running jobs go at half speed at worst while images
    wait to be decoded, and an image waits for a step or two. The last image of a turn may overdraw it.
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
        """The numbers of a job's images that wait."""
        return {key.image for key, _ in self._latents if key.job == job}

    def discard(self, job: str) -> None:
        """Remove a job's images."""
        self._latents = deque(entry for entry in self._latents if entry[0].job != job)

    def charge(self, seconds: float) -> None:
        """Decoding has taken so long."""
        self._credit -= seconds

    def begin_turn(self, step_seconds: float | None) -> None:
        """A UNet call took so long; None: there was none."""
        self._credit += step_seconds or 0.0

    def may_decode(self, already: int, step_seconds: float | None) -> bool:
        """Whether another image is decoded in this turn after `already` ones.

        Without a UNet call the first image does not depend on the credit.
        """
        return bool(self._latents) and (self._credit > 0 or (step_seconds is None and not already))

    def end_turn(self, step_seconds: float | None) -> None:
        """Forget the credit when nothing is left to decode, or no UNet call competes for the device."""
        if not self._latents or step_seconds is None:
            self._credit = 0.0

    def pop(self) -> ImageKey:
        """In turns an image of the smallest job, and the one that has waited longest."""
        self._popped += 1
        entry = min(self._latents, key=lambda entry: entry[1]) if self._popped % 2 else self._latents[0]
        self._latents.remove(entry)
        return entry[0]

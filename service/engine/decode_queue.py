"""The queue of images to decode, and how much of the device's time decoding may take."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from service.engine.job import ImageKey


class Undecoded(NamedTuple):
    """An image to decode. job_size: the number of images of its job; client: whose it is, with its weight."""

    key: ImageKey
    job_size: int
    client: str
    weight: float


@dataclass
class Turns:
    """Of a client with images in the queue. used: images taken, divided by the client's weight."""

    used: float
    popped: int = 0


class DecodeQueue:
    """Denoised images in the order of arrival, and a time credit for decoding them.

    Every UNet call adds its duration to the credit, and every decoding uses its own duration up. So decoding
    takes about as much time as UNet calls: running jobs slow down to half speed at worst, and an image waits
    for a step or two. The last image of a turn may overdraw the credit.

    Clients take turns by weight: the next image is one of the client that has used least. A client that comes
    starts at the level of the one that is next, so it does not catch up on images decoded before it came.
    """

    def __init__(self) -> None:
        self._latents: deque[Undecoded] = deque()
        self._turns: dict[str, Turns] = {}  # by client
        self._credit = 0.0  # seconds of UNet calls minus seconds of decoding

    def __len__(self) -> int:
        return len(self._latents)

    def add(self, key: ImageKey, job_size: int, client: str = "", weight: float = 1.0) -> None:
        """Append an image."""
        if client not in self._turns:
            self._turns[client] = Turns(min((each.used for each in self._turns.values()), default=0.0))
        self._latents.append(Undecoded(key, job_size, client, weight))

    def images_of(self, job: str) -> set[int]:
        """The indices of a job's images in the queue."""
        return {entry.key.image for entry in self._latents if entry.key.job == job}

    def discard(self, job: str) -> None:
        """Remove a job's images."""
        self._latents = deque(entry for entry in self._latents if entry.key.job != job)
        self._forget_idle()

    def _forget_idle(self) -> None:
        """Forget clients without images."""
        clients = {entry.client for entry in self._latents}
        self._turns = {client: turns for client, turns in self._turns.items() if client in clients}

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
        """Remove the next image, of the client that is next.

        Of one client, it is alternately one of the smallest job, and the one that has waited longest.
        """
        client = min(self._latents, key=lambda entry: self._turns[entry.client].used).client
        own, turns = [entry for entry in self._latents if entry.client == client], self._turns[client]
        turns.popped += 1
        entry = min(own, key=lambda entry: entry.job_size) if turns.popped % 2 else own[0]
        turns.used += 1 / entry.weight
        self._latents.remove(entry)
        self._forget_idle()
        return entry.key

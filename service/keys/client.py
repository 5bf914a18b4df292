"""A client: the holder of an API key, or everybody where no key is needed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KeyLimits:
    """The limits of a key; None: no limit."""

    requests_per_minute: int | None = None
    images_per_hour: int | None = None
    running_jobs: int | None = None  # queued or running at the same time


@dataclass(frozen=True)
class Client:
    """Who sent a request.

    id: the owner of a job, never shown outside the service. name: of the key, in metrics and logs; keys from
    files without names share one. share: weight of its jobs where clients compete for the device. alone:
    whether it may fill the queue, because there is no other key, or it needed none.
    """

    id: str
    name: str
    admin: bool = False
    limits: KeyLimits = KeyLimits()
    share: float = 1.0
    alone: bool = False

    @property
    def is_anonymous(self) -> bool:
        """Whether it needed no key."""
        return not self.id

    def may_see(self, owner: str) -> bool:
        """Whether it may read, watch and cancel the jobs of the client with this id."""
        return self.admin or self.id == owner


UNNAMED = "unnamed"  # the name of keys from files of plain keys
ANYBODY = Client("", "anonymous", admin=True, alone=True)  # where there are no keys
STRANGER = Client("", "anonymous", alone=True)  # without a key, where only the calls of admins need one

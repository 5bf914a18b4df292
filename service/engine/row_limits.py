"""How many rows of a group fit in memory, learnt from calls. Knows no torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from cachetools import LRUCache

GROUPS = 4096  # of which something is remembered: the last ones, since requests choose sizes and LoRAs
SHARE = 0.9  # of what is free; the rest is for what else a call's neighbourhood needs
RECOVERY = 64  # calls without a failure, after which a size that failed is tried again


@dataclass(frozen=True)
class Use:
    """What one call took: rows run, bytes at its peak, and bytes that calls may take in all."""

    rows: int
    peak: int
    room: int


@dataclass
class Fit:
    """What is known of one group: the size that its memory allows, and the one that failures allow."""

    measured: int
    allowed: int
    known: bool = False  # whether a call has told what it takes, or that it cannot be told
    calm: int = 0  # calls since the last failure, or since the last step of the recovery


class Limits:
    """The most rows of a call of each group, out of the sizes that calls are padded to.

    A group begins with the smallest size, whose first call tells what a row takes; a size that runs out of
    memory is not used again before RECOVERY calls have gone well.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.fits: LRUCache[Hashable, Fit] = LRUCache(GROUPS)

    def rows(self, group: Hashable) -> int:
        """The most rows that a call may have."""
        fit = self.fits.get(group)
        return min(fit.measured, fit.allowed) if fit else self.sizes[-1]

    def cautious(self, group: Hashable) -> None:
        """Begin small with a group that nothing is known of."""
        self.fits.setdefault(group, Fit(self.sizes[0], self.sizes[-1]))

    def passed(self, group: Hashable, use: Use | None = None) -> None:
        """A call went well; use: if it was measured."""
        fit = self.fits.get(group)
        if not fit:
            return
        if use:
            fit.measured = self._under(use.room * SHARE * use.rows / max(use.peak, 1))
        elif not fit.known:
            fit.measured = self.sizes[-1]
        fit.known = True
        if fit.allowed < self.sizes[-1]:
            fit.calm += 1
            if fit.calm >= RECOVERY:
                fit.calm, fit.allowed = 0, next(size for size in self.sizes if size > fit.allowed)

    def failed(self, group: Hashable, rows: int) -> None:
        """A call of so many rows ran out of memory."""
        fit = self.fits.setdefault(group, Fit(self.sizes[-1], self.sizes[-1], known=True))
        fit.calm, fit.allowed = 0, min(fit.allowed, self._under(rows - 1))

    def _under(self, rows: float) -> int:
        """The largest size of at most so many rows; 1, which means one image a call, below them all."""
        return max((size for size in self.sizes if size <= rows), default=1)

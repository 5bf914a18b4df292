"""How many rows of a group a UNet call can have, learned from the memory that calls take."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from cachetools import LRUCache

MAX_GROUPS = 4096  # groups remembered; there may be more, since requests choose sizes and LoRA weights
MEMORY_SHARE = 0.9  # of the free memory that calls may take; the rest is for decoding and fragmentation
RECOVERY_CALLS = 64  # calls without a failure, after which a size that failed is tried again


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one call of `rows` rows. peak: most bytes that it used; room: bytes that a call may use."""

    rows: int
    peak: int
    room: int


@dataclass
class GroupLimit:
    """The limits of one group. measured: most rows that fit by measured memory use; allowed: most rows of
    the sizes that have not run out of memory lately."""

    measured: int
    allowed: int
    known: bool = False  # a call has succeeded or failed
    successes: int = 0  # calls since the last failure, or since `allowed` was last raised


class RowLimits:
    """The most rows of a call of each group, out of the sizes that calls are padded to.

    A group starts with the smallest size, whose first call shows how much memory a row takes. A size that ran
    out of memory is not used again before RECOVERY_CALLS calls have succeeded.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self.groups: LRUCache[Hashable, GroupLimit] = LRUCache(MAX_GROUPS)

    def rows(self, group: Hashable) -> int:
        """The most rows that a call may have."""
        limit = self.groups.get(group)
        return min(limit.measured, limit.allowed) if limit else self.sizes[-1]

    def start_small(self, group: Hashable) -> None:
        """Limit an unknown group to the smallest size."""
        self.groups.setdefault(group, GroupLimit(self.sizes[0], self.sizes[-1]))

    def record_success(self, group: Hashable, memory: MemoryUse | None = None) -> None:
        """Account for a call that has succeeded; memory: its use of memory, if that was measured."""
        limit = self.groups.get(group)
        if not limit:
            return
        if memory:
            limit.measured = self._largest_within(
                memory.room * MEMORY_SHARE * memory.rows / max(memory.peak, 1)
            )
        elif not limit.known:
            limit.measured = self.sizes[-1]
        limit.known = True
        if limit.allowed < self.sizes[-1]:
            limit.successes += 1
            if limit.successes >= RECOVERY_CALLS:
                limit.successes = 0
                limit.allowed = next(size for size in self.sizes if size > limit.allowed)

    def record_failure(self, group: Hashable, rows: int) -> None:
        """Account for a call of `rows` rows that has run out of memory."""
        limit = self.groups.setdefault(group, GroupLimit(self.sizes[-1], self.sizes[-1], known=True))
        limit.successes, limit.allowed = 0, min(limit.allowed, self._largest_within(rows - 1))

    def _largest_within(self, rows: float) -> int:
        """The largest size of at most so many rows; 1 if there is none, which means one image per call."""
        return max((size for size in self.sizes if size <= rows), default=1)

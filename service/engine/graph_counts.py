"""How network calls ran: directly, or as replays of recordings (CUDA graphs)."""

from __future__ import annotations

from typing import NamedTuple


class GraphCounts(NamedTuple):
    """Numbers of calls and recordings since the worker's start; all are 0 where no calls are recorded.

    direct: calls that ran directly; replayed: as replays; recorded: calls that were recorded; failed: that
    could not be; dropped: recordings that made room for others or were of unloaded models; bytes: of device
    memory that the recordings occupy now.
    """

    direct: int = 0
    replayed: int = 0
    recorded: int = 0
    failed: int = 0
    dropped: int = 0
    bytes: int = 0


NO_GRAPHS = GraphCounts()

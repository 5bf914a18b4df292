"""Keys and values of contexts for cross-attention, computed once for a job and not at each of its steps."""

from __future__ import annotations

from collections.abc import Sequence

from cachetools import LRUCache
from torch import Tensor

from models.networks.unet import UNet

MAX_CONDITIONS = 8  # of a phase, whose keys and values are kept; a prompt schedule can have hundreds


class ContextKeys:
    """Keys and values of each condition of a phase, computed at the first step that needs them.

    Each condition is computed alone, so that its bits depend neither on the others nor on other jobs.
    """

    def __init__(self, unet: UNet, tokens: Tensor) -> None:
        """tokens: (N, L, C), the context of each condition."""
        self._unet = unet
        self._tokens = tokens
        self._kept: LRUCache[int, Tensor] = LRUCache(MAX_CONDITIONS)

    def rows(self, conditions: Sequence[int]) -> list[Tensor]:
        """The keys and values of some conditions, each (1, 2, L, W) as UNet.keys_values() returns them."""
        return [self._row(condition) for condition in conditions]

    def _row(self, condition: int) -> Tensor:
        if condition not in self._kept:
            self._kept[condition] = self._unet.keys_values(self._tokens[condition : condition + 1])
        return self._kept[condition]

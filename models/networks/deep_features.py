"""Deep features of the UNet, kept for later calls (DeepCache, Ma et al. 2023, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from models.spec import UNetSpec


@dataclass(frozen=True)
class DeepFeatures:
    """What a UNet call keeps of its deep blocks, or takes in their place.

    Branch b is the skip connection of input block b, counted from 0: the output block that takes it gets the
    deep feature as its other input. keep: branches whose features are stored in `kept`. With `reused`
    (R, C, h, w), the feature of `branch`, only input blocks 0 to `branch` and the last branch + 1 output
    blocks run.
    """

    keep: tuple[int, ...] = ()
    branch: int = 0
    reused: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def after_block(self, branch: int, x: Tensor) -> None:
        """Store x, the deep feature of a branch, if it is to be kept."""
        if branch in self.keep:
            self.kept[branch] = x


def shallow_share(spec: UNetSpec, branch: int) -> float:
    """The part of a UNet's blocks that run with a reused feature."""
    return 2 * (branch + 1) / (2 * spec.blocks + 1)

"""Large pictures in overlapping tiles: where they lie, and how they fade into each other. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Tiles(NamedTuple):
    """Tiles of one size (rows, columns) over a grid of cells: the upper left corner of each."""

    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    def slices(self, index: int, factor: int = 1) -> tuple[slice, slice]:
        """Rows and columns of a tile, of a picture in which a cell covers factor x factor pixels."""
        ends = zip(self.corners[index], self.size, strict=True)
        rows, columns = (slice(factor * start, factor * (start + size)) for start, size in ends)
        return rows, columns


def cut(h: int, w: int, side: int) -> Tiles:
    """Squares of `side` cells, or of what there is, that overlap by at least a quarter."""
    size = min(h, side), min(w, side)
    return Tiles(size, tuple((top, left) for top in starts(h, size[0]) for left in starts(w, size[1])))


def starts(size: int, tile: int) -> list[int]:
    """Where tiles begin along a side; the last ends with the side."""
    stride = tile - tile // 4
    return [*range(0, max(size - tile, 0), stride), max(size - tile, 0)]


def merge(parts: Iterable[np.ndarray], tiles: Tiles, factor: int) -> np.ndarray:
    """Tiles (f*rows, f*columns, C) of any numbers -> the whole (f*h, f*w, C) float32.

    Where tiles overlap, each counts the more the farther it is from its own border.
    """
    height, width = (factor * (last + n) for last, n in zip(tiles.corners[-1], tiles.size, strict=True))
    down, across = (ramp(factor * size, factor * size // 4) for size in tiles.size)
    fade = down[:, None, None] * across[:, None]
    total, weight = 0.0, np.zeros((height, width, 1), np.float32)
    for index, part in enumerate(parts):
        area = tiles.slices(index, factor)
        if not index:
            total = np.zeros((height, width, part.shape[2]), np.float32)
        total[area] += fade * part
        weight[area] += fade
    return total / weight


def ramp(size: int, fade: int) -> np.ndarray:
    """(size,): weights of a tile along one side, rising and falling over `fade` pixels at its ends."""
    distance = np.arange(size, dtype=np.float32) + 1
    return np.minimum(distance, distance[::-1]).clip(max=max(fade, 1)) / max(fade, 1)

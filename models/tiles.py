"""Large images in overlapping tiles: where the tiles are, and how they are blended. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_WHOLE_PIXELS = 2**21  # of an image that the autoencoder takes whole; larger ones are cut into tiles


class Tiles(NamedTuple):
    """Tiles of one size (rows, columns) on a grid of cells, by their upper left corners."""

    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    def slices(self, index: int, factor: int = 1) -> tuple[slice, slice]:
        """Rows and columns of a tile, in an image in which a cell covers factor x factor pixels."""
        ends = zip(self.corners[index], self.size, strict=True)
        rows, columns = (slice(factor * start, factor * (start + size)) for start, size in ends)
        return rows, columns


def cut(h: int, w: int, side: int) -> Tiles:
    """Cuts a grid of h x w cells into tiles of side x side cells that overlap by at least a quarter.

    A side of the grid that is shorter than a tile is one tile long.
    """
    size = min(h, side), min(w, side)
    return Tiles(size, tuple((top, left) for top in starts(h, size[0]) for left in starts(w, size[1])))


def starts(size: int, tile: int) -> list[int]:
    """First cell of each tile along a side of `size` cells; the last tile ends where the side ends."""
    stride = tile - tile // 4
    return [*range(0, max(size - tile, 0), stride), max(size - tile, 0)]


def merge(parts: Iterable[NDArray[Any]], tiles: Tiles, factor: int) -> NDArray[np.float32]:
    """Tiles (f*rows, f*columns, C) of any dtype -> the whole image (f*h, f*w, C) float32.

    Where tiles overlap, a pixel's weight grows with its distance from the tile's border. Raises ValueError
    for no tiles.
    """
    height, width = (factor * (last + n) for last, n in zip(tiles.corners[-1], tiles.size, strict=True))
    down, across = (ramp(factor * size, factor * size // 4) for size in tiles.size)
    fade = down[:, None, None] * across[:, None]
    total: NDArray[np.float32] | None = None
    weight = np.zeros((height, width, 1), np.float32)
    for index, part in enumerate(parts):
        area = tiles.slices(index, factor)
        if total is None:
            total = np.zeros((height, width, part.shape[2]), np.float32)
        total[area] += fade * part
        weight[area] += fade
    if total is None:
        raise ValueError("no tiles to merge")
    return total / weight


def ramp(size: int, fade: int) -> NDArray[np.float32]:
    """(size,): weights of a tile along one side, rising and falling over `fade` pixels at its ends."""
    distance: NDArray[np.float32] = np.arange(1, size + 1, dtype=np.float32)
    limit = np.float32(max(fade, 1))
    nearer_end: NDArray[np.float32] = np.minimum(distance, distance[::-1])
    return (nearer_end.clip(max=limit) / limit).astype(np.float32, copy=False)

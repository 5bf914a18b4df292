"""Boxes as the tokens that a transformer reads (Rombach et al. 2021, appendix E.2). Free of torch.

An object is three tokens: its category, and the corners of its box, upper left and lower right, each a point
of a square grid of as many points as there are tokens, counted row by row. Places for more objects hold the
last token. Two corners at the end tell which part of the whole scene the picture shows; here it shows all.
This is what the reference's data sets do (taming-transformers, ObjectsBoundingBoxConditionalBuilder).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

from models.spec import TokenSpec


class Box(NamedTuple):
    """An object's category, its upper left corner and its size, as parts of the picture's sides.

    The reference adds how an object is seen to its category: categories times 1 (a group), 2 (occluded), 4
    (a depiction) and 8 (seen from inside).
    """

    category: int
    x: float
    y: float
    w: float
    h: float


def tokens(boxes: Sequence[Box], spec: TokenSpec) -> list[int]:
    """The tokens of a scene, spec.tokens of them. A box that lies outside is left out, one over the edge ends
    there. Raises ValueError for more boxes than there is place for, and for a category that is no token."""
    none, side = spec.vocabulary - 1, isqrt(spec.vocabulary)
    if len(boxes) > spec.objects:
        raise ValueError(f"{len(boxes)} boxes; the model has place for {spec.objects}")
    triples = []
    for box in boxes:
        if not 0 <= box.category < none:
            raise ValueError(f"category {box.category}; categories are 0 to {none - 1}")
        if overlap(box.x, box.w) and overlap(box.y, box.h):
            left, top = (min(max(start, 0.0), 1.0) for start in (box.x, box.y))
            right, bottom = left + min(box.w, 1 - left), top + min(box.h, 1 - top)
            triples.append((box.category, point(left, top, side), point(right, bottom, side)))
    triples += [(none, none, none)] * (spec.objects - len(triples))
    return [token for triple in triples for token in triple] + [point(0, 0, side), point(1, 1, side)]


def overlap(start: float, extent: float) -> bool:
    """Whether any of it lies inside."""
    return min(start + extent, 1.0) > max(start, 0.0)


def point(x: float, y: float, side: int) -> int:
    """The nearest point of a grid of side x side."""
    return round(y * (side - 1)) * side + round(x * (side - 1))

"""Boxes as the tokens that a transformer reads (Rombach et al. 2021, appendix E.2). Imports no torch.

An object is three tokens: its category, and the upper left and lower right corners of its box. A corner is
the number of the nearest point of a square grid, counted row by row; the grid has about as many points as the
vocabulary has tokens. Unused positions hold the last token. The final two tokens are the corners of the part
of the scene that the image shows; here it always shows all of it. The reference does the same
(taming-transformers, ObjectsBoundingBoxConditionalBuilder).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

from models.spec import TokenSpec


class Box(NamedTuple):
    """An object's category, and the upper left corner and size of its box in fractions of the image's sides.

    The reference encodes annotations in the category, by adding multiples of the number of categories: 1 for
    a group, 2 for an occluded object, 4 for a depiction, 8 for a view from inside.
    """

    category: int
    x: float
    y: float
    w: float
    h: float


def tokens(boxes: Sequence[Box], spec: TokenSpec) -> list[int]:
    """The spec.tokens tokens of a layout. Boxes are clipped to the image; boxes outside it are left out.

    Raises ValueError for too many boxes and for an unknown category.
    """
    no_object, side = spec.vocabulary - 1, isqrt(spec.vocabulary)
    if len(boxes) > spec.objects:
        raise ValueError(f"{len(boxes)} boxes are too many; the model takes at most {spec.objects}")
    triples = []
    for box in boxes:
        if not 0 <= box.category < no_object:
            raise ValueError(f"category {box.category} is unknown; categories are 0 to {no_object - 1}")
        if overlaps_image(box.x, box.w) and overlaps_image(box.y, box.h):
            left, top = (min(max(start, 0.0), 1.0) for start in (box.x, box.y))
            right, bottom = left + min(box.w, 1 - left), top + min(box.h, 1 - top)
            triples.append((box.category, point(left, top, side), point(right, bottom, side)))
    triples += [(no_object, no_object, no_object)] * (spec.objects - len(triples))
    return [token for triple in triples for token in triple] + [point(0, 0, side), point(1, 1, side)]


def overlaps_image(start: float, extent: float) -> bool:
    """Whether a span along one side has any part between 0 and 1."""
    return min(start + extent, 1.0) > max(start, 0.0)


def point(x: float, y: float, side: int) -> int:
    """The index of the nearest point of a grid of side x side."""
    return round(y * (side - 1)) * side + round(x * (side - 1))

"""What goes where: boxes and label colours -> the label of every cell of the latent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from service.errors import InvalidRequest
from service.schemas import Box


def colour_of(number: int) -> tuple[int, int, int]:
    """Of label `number`, counted from 1: the colour map of the PASCAL VOC segmentations; 0 is black.

    Bits 0, 3, 6, ... of the number are the upper bits of red, the next ones of green and blue.
    """
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (number >> (3 * place + channel) & 1) << (7 - place)
    return tuple(channels)


def number_of(name: str, labels: Sequence[str], param: str) -> int:
    """The number of a label, counted from 1. Raises InvalidRequest."""
    try:
        return labels.index(name) + 1
    except ValueError:
        raise InvalidRequest(
            f"{param} must be a label of the model; GET /models lists them", param=param
        ) from None


def from_boxes(boxes: Sequence[Box], labels: Sequence[str], h: int, w: int) -> np.ndarray:
    """Each box fills the cells whose middle it covers, and the nearest one at least: uint16 (h, w)."""
    regions = np.zeros((h, w), np.uint16)
    for index, box in enumerate(boxes):
        rows, columns = cells(box.y, box.h, h), cells(box.x, box.w, w)
        regions[rows, columns] = number_of(box.name, labels, f"boxes.{index}.name")
    return regions


def cells(start: float, extent: float, count: int) -> slice:
    """The cells of `count` whose middle lies between start and start + extent, parts of the side."""
    first = min(round(start * count), count - 1)
    return slice(first, max(round(min(start + extent, 1.0) * count), first + 1))


def from_colours(picture: Image.Image, labels: Sequence[str], h: int, w: int, param: str) -> np.ndarray:
    """The label whose colour the middle of each cell has: uint16 (h, w). Raises InvalidRequest for others."""
    known = {colour_of(number): number for number in range(len(labels) + 1)}
    pixels = np.asarray(picture.resize((w, h), Image.Resampling.NEAREST))
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    numbers = [known.get(tuple(int(part) for part in colour)) for colour in colours]
    if None in numbers:
        strange = "#{:02x}{:02x}{:02x}".format(*colours[numbers.index(None)])
        raise InvalidRequest(
            f"{param} has {strange}, the colour of no label; GET /models lists them", param=param
        )
    return np.array(numbers, np.uint16)[index].reshape(h, w)

"""Layouts: from boxes and label colours to the label of each cell of an image, or to numbered boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from models.conditioning import boxes as boxes_of
from models.spec import ModelSpec, TokenSpec
from service.errors import InvalidRequest
from service.requests.schemas import LabelBox


def colour_of(number: int) -> tuple[int, int, int]:
    """The colour of label `number`, counted from 1, in the colour map of PASCAL VOC; 0 is black.

    Bits 0, 3, 6, ... of the number are the upper bits of red, the next ones of green and blue.
    """
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (number >> (3 * place + channel) & 1) << (7 - place)
    return channels[0], channels[1], channels[2]


def number_of(label: int | str, spec: ModelSpec, param: str) -> int:
    """The number of a label, counted from 0. If labels have no names, text may be a number.

    Raises InvalidRequest, which names `param`.
    """
    if isinstance(label, str) and label in spec.labels:
        return spec.labels.index(label)
    if isinstance(label, str) and not spec.labels and label.isdecimal():
        label = int(label)
    if isinstance(label, str):
        expected = (
            "label of the model; GET /models lists them" if spec.labels else "number: labels have no names"
        )
        raise InvalidRequest(f"{param} must be a {expected}", param=param)
    if label >= spec.label_count:
        raise InvalidRequest(f"{param} must be less than {spec.label_count}", param=param)
    return label


def from_boxes(boxes: Sequence[LabelBox], spec: ModelSpec, h: int, w: int) -> np.ndarray:
    """(h, w) uint16: each box fills the cells whose centre it covers, and at least the nearest cell."""
    regions = np.zeros((h, w), np.uint16)
    for index, box in enumerate(boxes):
        rows, columns = cells(box.y, box.h, h), cells(box.x, box.w, w)
        regions[rows, columns] = 1 + number_of(box.name, spec, f"boxes.{index}.name")
    return regions


def to_prompt(regions: np.ndarray, spec: ModelSpec) -> str:
    """A prompt of the labels in `regions`, such as "A, B and C". regions: numbers from 1; 0: no label."""
    names = [spec.labels[number - 1] for number in np.unique(regions) if number]
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def to_numbered_boxes(boxes: Sequence[LabelBox], spec: ModelSpec) -> tuple[boxes_of.Box, ...]:
    """Boxes for a model that reads boxes as tokens. Raises InvalidRequest."""
    most = spec.condition.objects if isinstance(spec.condition, TokenSpec) else 0
    if len(boxes) > most:
        raise InvalidRequest(f"boxes must have at most {most} items for this model", param="boxes")
    numbers = [number_of(box.name, spec, f"boxes.{index}.name") for index, box in enumerate(boxes)]
    return tuple(
        boxes_of.Box(number, box.x, box.y, box.w, box.h) for number, box in zip(numbers, boxes, strict=True)
    )


def cells(start: float, extent: float, count: int) -> slice:
    """The cells (of `count` along a side) whose centre is in [start, start + extent], in fractions of it."""
    first = min(round(start * count), count - 1)
    return slice(first, max(round(min(start + extent, 1.0) * count), first + 1))


def from_colours(image: Image.Image, spec: ModelSpec, h: int, w: int, param: str) -> np.ndarray:
    """(h, w) uint16: the label of the colour at the centre of each cell.

    Raises InvalidRequest for other colours, and for black if the model needs a label everywhere.
    """
    number_of_colour = {colour_of(number): number for number in range(spec.label_count + 1)}
    pixels = np.asarray(image.resize((w, h), Image.Resampling.NEAREST))
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    numbers = [number_of_colour.get((int(red), int(green), int(blue))) for red, green, blue in colours]
    if None in numbers:
        unknown = "#{:02x}{:02x}{:02x}".format(*colours[numbers.index(None)])
        raise InvalidRequest(
            f"{param} contains {unknown}, which is no label's colour; GET /models lists the colours",
            param=param,
        )
    if 0 in numbers and spec.labels_pixels:
        raise InvalidRequest(f"{param} has black pixels; this model needs a label everywhere", param=param)
    return np.array(numbers, np.uint16)[index].reshape(h, w)

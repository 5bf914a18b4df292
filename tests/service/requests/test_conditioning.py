"""Classes, boxes and segmentations: how a request is resolved to a prompt and a map of labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.sampling.guidance import row_count
from models.spec import ModelSpec
from service.api.native import describe
from service.errors import InvalidRequest
from service.requests.labels import colour_of
from service.requests.resolve import resolve
from service.requests.resolved_request import ResolvedRequest
from service.requests.schemas import GenerateRequest, InpaintRequest
from service.settings import Settings
from tests.checkpoints.tiny import scene_spec, tiny_spec
from tests.helpers.images import png

BOX = {"name": "dog", "x": 0.5, "y": 0.0, "w": 0.5, "h": 0.25}


def resolved_of(spec: ModelSpec | None = None, **body) -> ResolvedRequest:
    kind = InpaintRequest if "mask" in body else GenerateRequest
    return resolve(kind.model_validate(body), {"m": spec or scene_spec()}, Settings())


def cells(resolved: ResolvedRequest) -> np.ndarray:
    shape = resolved.canvas_height // 8, resolved.canvas_width // 8
    return np.frombuffer(resolved.inputs.regions, np.uint16).reshape(shape)


def painting(*strips: tuple[int, int, int], size: int = 64) -> str:
    """Strips of these colours from left to right."""
    pixels = np.zeros((size, size, 3), np.uint8)
    for index, colour in enumerate(strips):
        pixels[:, index * size // len(strips) :] = colour
    return png(pixels)


def test_a_class_label_is_a_prompt_by_name_or_number():
    assert resolved_of(class_label=1).prompt == resolved_of(class_label="dog").prompt == "dog"


def test_boxes_without_a_prompt_give_one():
    bird, cat = dict(BOX, name="bird", y=0.5), dict(BOX, name="cat", x=0.0)
    assert resolved_of(boxes=[BOX]).prompt == "dog"
    assert resolved_of(boxes=[BOX, bird]).prompt == "dog and bird"
    assert resolved_of(boxes=[bird, BOX, cat]).prompt == "cat, dog and bird"
    assert resolved_of(boxes=[BOX], prompt="a dog").prompt == "a dog"


def test_boxes_fill_their_cells_and_later_ones_cover_earlier_ones():
    over = {"name": "bird", "x": 0.75, "y": 0.0, "w": 0.01, "h": 0.01}
    resolved = resolved_of(boxes=[BOX, over])
    expected = np.zeros((8, 8), np.uint16)
    expected[:2, 4:] = 2
    expected[0, 6] = 3
    assert (cells(resolved) == expected).all()
    assert resolved.parameters.of_image(0)["boxes"] == [BOX, over]
    assert resolved.parameters.of_image(0)["prompt"] == "dog and bird"


def test_a_box_is_cut_at_the_edge():
    assert (cells(resolved_of(boxes=[BOX | {"x": 0.9, "w": 0.9}]))[:2, 7] == 2).all()


def test_boxes_of_an_inpainting_are_fractions_of_the_image():
    image, mask = np.zeros((36, 36, 3), np.uint8), np.full((36, 36), 255, np.uint8)
    resolved = resolved_of(image=png(image), mask=png(mask), boxes=[BOX | {"x": 0.0, "w": 1.0, "h": 1.0}])
    assert (resolved.canvas_width, resolved.canvas_height) == (40, 40)
    assert (cells(resolved)[:4, :4] == 2).all()


def test_the_colours_of_a_segmentation_are_labels():
    resolved = resolved_of(prompt="p", segmentation=painting((0, 0, 0), colour_of(1), colour_of(3), size=96))
    columns = [0, 0, 0, 1, 1, 3, 3, 3]
    assert (cells(resolved) == np.array(columns)).all()


def test_colours_of_labels_are_distinct_and_listed():
    colours = [colour_of(number) for number in range(2000)]
    assert colours[:3] == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    assert len(set(colours)) == 2000
    listed = describe(scene_spec(), Settings())
    assert [(label.name, label.colour) for label in listed.labels][1] == ("dog", "#008000")
    assert listed.inpainting == "mask channels"
    assert describe(tiny_spec(), Settings()).inpainting == "blending"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"class_label": 3}, "class_label"),
        ({"class_label": "horse"}, "class_label"),
        ({"class_label": 1, "prompt": "dog"}, "class_label"),
        ({"boxes": [BOX | {"name": "horse"}]}, "boxes.0.name"),
        ({"boxes": [BOX], "segmentation": painting((0, 0, 0))}, "segmentation"),
        ({"segmentation": painting((1, 2, 3))}, "segmentation"),
        ({"segmentation": "????"}, "segmentation"),
    ],
)
def test_an_invalid_condition_is_refused_by_its_field(body, param):
    with pytest.raises(InvalidRequest) as refused:
        resolved_of(**body)
    assert refused.value.param == param


@pytest.mark.parametrize("body", [{"class_label": 1}, {"boxes": [BOX]}, {"segmentation": "x"}, {}])
def test_a_text_to_image_model_refuses_other_conditions(body):
    with pytest.raises(InvalidRequest) as refused:
        resolved_of(tiny_spec(), **body)
    assert refused.value.param == next(iter(body), "prompt")


def test_a_model_may_need_no_condition():
    assert resolved_of().prompt == ""


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        ({}, 1),
        ({"prompt": "dog", "negative_prompt": "dog"}, 1),
        ({"guidance_scale": 4.0}, 2),
        ({"prompt": "dog"}, 2),
        ({"negative_prompt": "dog"}, 2),
        ({"class_label": 1}, 2),
        ({"boxes": [BOX]}, 2),
    ],
)
def test_an_image_without_conditions_takes_one_row(body, rows):
    job = resolved_of(**body).to_job()
    assert (row_count(job.guidance_scale), job.guidance_scale > 1) == (rows, rows == 2)
    zeros = replace(scene_spec(), zero_null=True)  # guidance compares with zeros, not with the empty prompt
    assert row_count(resolved_of(zeros, **body).to_job().guidance_scale) == (rows if body else 2)

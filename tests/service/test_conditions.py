"""Classes, boxes, regions and mask channels: from the wire to what the UNet is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load, save
from models.spec import ModelSpec
from service.api.native import describe
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.engine.job import ImageKey, Job
from service.errors import InvalidRequest
from service.requests.labels import colour_of
from service.requests.resolve import resolve
from service.requests.resolved_request import ResolvedRequest
from service.requests.schemas import GenerateRequest, InpaintRequest
from service.settings import Settings
from tests.checkpoints.tiny import random_model, scene_spec, tiny_spec
from tests.helpers.fake_runner import make_job
from tests.helpers.images import IMAGE, MASK, png, psnr
from tests.helpers.torch_runner import begin, left

BOX = {"name": "dog", "x": 0.5, "y": 0.0, "w": 0.5, "h": 0.25}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "scene"
    save(random_model(scene_spec()), folder, torch.float32)
    return folder


@pytest.fixture
def runner(scene: Path) -> TorchRunner:
    return TorchRunner(Registry({"m": scene}, load), buckets=(2, 4, 8))


def order_of(spec: ModelSpec | None = None, **body) -> ResolvedRequest:
    kind = InpaintRequest if "mask" in body else GenerateRequest
    return resolve(kind.model_validate(body), {"m": spec or scene_spec()}, Settings())


def cells(order: ResolvedRequest) -> np.ndarray:
    shape = order.canvas_height // 8, order.canvas_width // 8
    return np.frombuffer(order.inputs.regions, np.uint16).reshape(shape)


def painting(*strips: tuple[int, int, int], size: int = 64) -> str:
    """Strips of these colours from left to right."""
    pixels = np.zeros((size, size, 3), np.uint8)
    for index, colour in enumerate(strips):
        pixels[:, index * size // len(strips) :] = colour
    return png(pixels)


def test_what_is_saved_is_loaded_with_its_labels_and_its_layout(scene):
    bundle, expected = load(scene), random_model(scene_spec())
    assert bundle.spec == scene_spec()
    regions = torch.tensor([[0, 1], [2, 3]])
    assert torch.equal(bundle.conditioner.from_regions(regions), expected.conditioner.from_regions(regions))


def test_a_label_is_a_prompt_by_its_name_or_number():
    assert order_of(class_label=1).prompt == order_of(class_label="dog").prompt == "dog"


def test_what_goes_where_is_a_prompt_too_where_there_is_none():
    bird, cat = dict(BOX, name="bird", y=0.5), dict(BOX, name="cat", x=0.0)
    assert order_of(boxes=[BOX]).prompt == "dog"
    assert order_of(boxes=[BOX, bird]).prompt == "dog and bird"
    assert order_of(boxes=[bird, BOX, cat]).prompt == "cat, dog and bird"
    assert order_of(boxes=[BOX], prompt="a dog").prompt == "a dog"


def test_boxes_fill_the_cells_under_them_and_later_ones_lie_on_top():
    over = {"name": "bird", "x": 0.75, "y": 0.0, "w": 0.01, "h": 0.01}
    order = order_of(boxes=[BOX, over])
    expected = np.zeros((8, 8), np.uint16)
    expected[:2, 4:] = 2
    expected[0, 6] = 3
    assert (cells(order) == expected).all()
    assert order.parameters.of_image(0)["boxes"] == [BOX, over]
    assert order.parameters.of_image(0)["prompt"] == "dog and bird"


def test_a_box_over_the_edge_ends_there():
    assert (cells(order_of(boxes=[BOX | {"x": 0.9, "w": 0.9}]))[:2, 7] == 2).all()


def test_boxes_of_a_picture_to_inpaint_are_parts_of_that_picture():
    picture, mask = np.zeros((40, 40, 3), np.uint8), np.full((40, 40), 255, np.uint8)
    order = order_of(image=png(picture), mask=png(mask), boxes=[BOX | {"x": 0.0, "w": 1.0, "h": 1.0}])
    assert (order.canvas_width, order.canvas_height) == (48, 48)
    assert (cells(order)[:5, :5] == 2).all()
    assert cells(order)[5].sum() == cells(order)[:, 5].sum() == 0


def test_the_colours_of_a_segmentation_are_labels():
    order = order_of(prompt="p", segmentation=painting((0, 0, 0), colour_of(1), colour_of(3), size=96))
    columns = [0, 0, 0, 1, 1, 3, 3, 3]
    assert (cells(order) == np.array(columns)).all()


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
def test_conditions_that_say_nothing_are_refused(body, param):
    with pytest.raises(InvalidRequest) as refused:
        order_of(**body)
    assert refused.value.param == param


@pytest.mark.parametrize("body", [{"class_label": 1}, {"boxes": [BOX]}, {"segmentation": "x"}, {}])
def test_a_model_of_text_alone_refuses_other_conditions(body):
    with pytest.raises(InvalidRequest) as refused:
        order_of(tiny_spec(), **body)
    assert refused.value.param == next(iter(body), "prompt")


def test_nothing_at_all_is_asked_of_a_model_that_needs_no_condition():
    assert order_of().prompt == ""


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
def test_nothing_is_guided_where_nothing_is_asked_for(body, rows):
    job = order_of(**body).to_job()
    assert (job.rows, job.guidance_scale > 1) == (rows, rows == 2)
    zeros = replace(scene_spec(), zero_null=True)  # the empty prompt is not what guidance compares with
    assert order_of(zeros, **body).to_job().rows == (rows if body else 2)


def test_guidance_changes_nothing_where_nothing_is_asked_for(runner):
    guided, plain = (scene_job(f"{scale}", prompt="", guidance_scale=scale) for scale in (3.0, 1.0))
    first, second = finished(runner, guided, plain)
    assert psnr(first, second) > 50


def scene_job(name: str = "a", **changes) -> Job:
    return make_job(name, **({"width": 64, "height": 64} | changes))


def regions(number: int) -> bytes:
    return np.full((8, 8), number, np.uint16).tobytes()


def finished(runner: TorchRunner, *jobs: Job) -> list[bytes]:
    """Their pictures, made together."""
    for job in jobs:
        begin(runner, job)
    while running := [job for job in jobs if left(runner, job)]:
        runner.step([ImageKey(job.id, 0) for job in running])
    return [runner.finish(ImageKey(job.id, 0)) for job in jobs]


def test_every_task_shares_one_call_and_none_changes_another(runner):
    jobs = [
        scene_job("a"),
        scene_job("b", image=IMAGE.tobytes(), strength=0.7, guidance_scale=1.0),
        scene_job("c", image=IMAGE.tobytes(), mask=MASK.tobytes(), steps=4),
        scene_job("d", regions=regions(2), eta=1.0),
        scene_job("e", image=IMAGE.tobytes(), mask=MASK.tobytes(), regions=regions(1), prompt=""),
    ]
    groups = {runner.shape(job).group for job in jobs}
    assert len(groups) == 1
    together = finished(runner, *jobs)
    for job, picture in zip(jobs, together, strict=True):
        (alone,) = finished(TorchRunner(runner.registry, runner.buckets), job)
        assert psnr(alone, picture) > 40


def test_guidance_compares_with_no_words_and_no_regions_but_with_the_same_mask(runner):
    job = scene_job(image=IMAGE.tobytes(), mask=MASK.tobytes(), regions=regions(2))
    begin(runner, job)
    null, told = runner.jobs["a"].images[0].concat
    assert null.shape == (1 + 4 + 3, 8, 8)
    assert torch.equal(null[:5], told[:5])
    assert not null[5:].any()
    assert told[5:].any()


def test_mask_channels_hold_the_mask_and_the_latent_of_what_it_keeps(runner):
    begin(runner, scene_job(image=IMAGE.tobytes(), mask=MASK.tobytes()))
    state, bundle = runner.jobs["a"], runner.registry["m"]
    x = torch.from_numpy(IMAGE).permute(2, 0, 1)[None] / 127.5 - 1
    z = bundle.encode(torch.where(torch.from_numpy(MASK >= 128), 0.0, x))[0]
    assert state.mask is None  # nothing is blended
    assert torch.equal(state.images[0].concat[0, 0].nonzero().min(0).values, torch.tensor([2, 3]))
    assert torch.allclose(state.images[0].concat[0, 1:5], z, atol=1e-5)


def test_without_a_mask_everything_is_to_be_painted(runner):
    begin(runner, scene_job(guidance_scale=1.0))
    (row,) = runner.jobs["a"].images[0].concat
    assert (row[0] == 1).all()
    assert torch.equal(row[1:5], runner.registry["m"].encode(torch.zeros(1, 3, 64, 64))[0])


@pytest.mark.parametrize("changes", [{"regions": regions(3)}, {"prompt": "q"}, {"mask": MASK.tobytes()}])
def test_every_condition_changes_the_picture(runner, changes):
    base = {
        "image": IMAGE.tobytes(),
        "regions": regions(1),
        "mask": np.full((64, 64), 255, np.uint8).tobytes(),
    }
    first, second = finished(runner, scene_job("a", **base), scene_job("b", **(base | changes)))
    assert psnr(first, second) < 40

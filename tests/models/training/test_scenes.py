"""The drawn data set, its held-out pairs, and whether evaluation recognises drawn images."""

import os
import re
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from models.spec import ModelSpec
from models.training import presets
from models.training.diffusion import draw_mask, layouts
from models.training.evaluate import (
    Judge,
    background,
    boxed_objects,
    held_out_prompts,
    inpainting_gain,
    named_object_accuracy,
    nearest_colour,
    psnr,
    random_masks,
    related_objects,
)
from models.training.scenes import (
    COLOURS,
    FONT,
    KINDS,
    RELATIONS,
    SIZE,
    Atlas,
    Placed,
    compose,
    draw_scene,
    flat,
    held_out,
    known_glyphs,
    related,
    scene_of,
    without_occluded,
)

if not FONT.exists() and not os.environ.get("LDM_TESTS_MUST_NOT_SKIP"):
    pytest.skip("fonts-noto-color-emoji is not installed", allow_module_level=True)

NAMES = ("red apple", "dog face", "automobile", "rocket", "cactus", "umbrella", "fire", "slice of pizza")


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas(NAMES)


def test_the_list_names_over_a_thousand_glyphs() -> None:
    glyphs = known_glyphs()
    assert len(glyphs) > 1200
    assert glyphs["red apple"] == 0x1F34E


def test_about_one_pair_in_ten_is_held_out() -> None:
    share = np.mean([held_out(name, colour) for name in known_glyphs() for colour in COLOURS])
    assert 0.08 < share < 0.12


def test_scenes_never_show_a_held_out_pair(atlas: Atlas) -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        scene = draw_scene(atlas, rng, kinds={"one": 1})
        name, colour = scene.caption.removesuffix(" background").split(" on a ")
        assert not held_out(name, colour)
        assert scene.short_caption == name
        assert scene.names == (name,)
        assert nearest_colour(background(scene.image)) == colour


def test_two_objects_are_placed_as_the_caption_says(atlas: Atlas) -> None:
    rng, seen = np.random.default_rng(1), set()
    for _ in range(40):
        scene = draw_scene(atlas, rng, kinds={"related": 1})
        relation = next((r for r in RELATIONS if f" {r} " in scene.caption), "and")
        assert scene.short_caption == f" {relation} ".join(scene.names)
        seen.add(relation)
        if relation == "and":
            continue
        (left, top, right, bottom), other = scene.boxes()
        where = {"left of": right <= other[0], "right of": left >= other[2]}
        assert (where | {"above": bottom <= other[1], "below": top >= other[3]})[relation]
    assert seen == {*RELATIONS, "and"}


@pytest.mark.parametrize("kind", KINDS)
def test_regions_and_layouts_match_the_objects(atlas: Atlas, kind: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(5):
        scene = draw_scene(atlas, rng, kinds={kind: 1})
        assert set(np.unique(scene.regions)) == set(range(len(scene.names) + 1))
        if kind != "fancy":
            apart = np.abs(scene.image.astype(int) - background(scene.image)).sum(-1) > 120
            assert (scene.regions[apart] > 0).mean() > 0.9
        boxes, silhouettes = layouts(scene, dict.fromkeys(scene.names, 7), factor=8)
        assert boxes.shape == silhouettes.shape == (16, 16)
        assert set(np.unique(boxes)) | set(np.unique(silhouettes)) == {0, 7}
        assert (boxes > 0).sum() >= (silhouettes > 0).sum()


def test_masks_cover_a_part_of_a_scene(atlas: Atlas) -> None:
    rng = np.random.default_rng(3)
    scene = draw_scene(atlas, rng, kinds={"one": 1})
    for kind in range(3):
        shares = [draw_mask(rng, scene, (kind,)).mean() for _ in range(10)]
        assert min(shares) > 0
        assert max(shares) < 1
    assert (draw_mask(rng, scene, (0,)) | (scene.regions == 0)).all()


def test_objects_that_a_mask_covers_completely_are_removed(atlas: Atlas) -> None:
    left, right = Placed("fire", 50, 31, 64), Placed("cactus", 50, 96, 64)
    scene = scene_of(atlas, [left, right], "blue", "fire left of cactus")
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:, :80] = True  # all of the fire, some of the cactus
    rest = without_occluded(atlas, scene, mask)
    assert rest.names == ("cactus",)
    assert rest.caption == rest.short_caption == ""
    assert (rest.image[:, :60] == COLOURS["blue"]).all()
    assert np.array_equal(rest.image[~mask], scene.image[~mask])
    assert set(np.unique(rest.regions)) == {0, 1}


def test_the_same_seed_draws_the_same_scene(atlas: Atlas) -> None:
    a, b = (draw_scene(atlas, np.random.default_rng(7)) for _ in range(2))
    assert a.caption == b.caption
    assert np.array_equal(a.image, b.image)


def drawn(atlas: Atlas, captions: Sequence[str]) -> np.ndarray:
    """Images that show exactly what the captions say."""
    images = []
    for caption in captions:
        words, colour = caption.removesuffix(" background").split(" on a ")
        placed = [Placed(words, 80, 60, 66)]
        for relation in RELATIONS:
            if f" {relation} " in words:
                placed = related(np.random.default_rng(0), words.split(f" {relation} "), relation)
        images.append(compose(atlas, flat(colour), placed)[0])
    return np.stack(images)


def test_accuracy_is_1_for_right_images_and_low_for_wrong_ones(atlas: Atlas) -> None:
    judge, pairs = Judge(atlas), held_out_prompts(NAMES, 8)
    assert named_object_accuracy(judge, pairs, lambda prompts: drawn(atlas, prompts)).top1 == 1.0
    wrong = named_object_accuracy(judge, pairs, lambda prompts: np.roll(drawn(atlas, prompts), 1, axis=0))
    assert wrong.top1 < 0.5


def test_the_accuracy_of_relations_requires_objects_and_positions(atlas: Atlas) -> None:
    def mirrored(prompts: Sequence[str]) -> np.ndarray:
        return drawn(atlas, prompts)[:, ::-1, ::-1]

    def swapped(prompts: Sequence[str]) -> np.ndarray:
        return drawn(atlas, [re.sub("|".join(opposite), lambda m: opposite[m[0]], p) for p in prompts])

    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    judge = Judge(atlas)
    assert related_objects(judge, lambda prompts: drawn(atlas, prompts), NAMES, 12) == (1.0, 1.0)
    assert related_objects(judge, swapped, NAMES, 12) == (1.0, 0.0)
    assert related_objects(judge, mirrored, NAMES, 12)[1] == 0.0


class Boxes:
    """In place of a model: draws each box's object, moved by so many pixels."""

    def __init__(self, atlas: Atlas, move: int = 0, spec: ModelSpec | None = None) -> None:
        self.atlas, self.move, self.model = atlas, move, SimpleNamespace(spec=spec)

    def for_layouts(self, maps: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return maps

    def __call__(self, prompts: Sequence[str], maps: Sequence[np.ndarray]) -> np.ndarray:
        images = []
        for numbers in maps:
            rows, columns = np.nonzero(numbers)
            x, y = (8 * (int(side.min() + side.max()) + 1) // 2 for side in (columns, rows))
            name = NAMES[numbers.max() - 1]
            size = 8 * (int(np.ptp(columns)) + 1)
            placed = Placed(name, size, x + self.move, y)
            images.append(compose(self.atlas, flat("blue"), [placed])[0])
        return np.stack(images)


def test_the_accuracy_of_boxes_requires_object_and_position(atlas: Atlas) -> None:
    spec, judge = SimpleNamespace(autoencoder=presets.AUTOENCODER), Judge(atlas)
    assert boxed_objects(judge, Boxes(atlas, spec=spec), NAMES, 12) == (1.0, 1.0, 1.0)
    assert boxed_objects(judge, Boxes(atlas, 48, spec), NAMES, 12)[1] < 0.5


class Filler:
    """In place of a model: returns given images."""

    def __init__(self, made: np.ndarray) -> None:
        self.made = made

    def for_inpainting(self, images: np.ndarray, masks: np.ndarray) -> None:
        return None

    def __call__(self, prompts: list[str], concat_channels: None) -> np.ndarray:
        return self.made


def test_the_inpainting_gain_is_0_for_the_mean_colour_and_large_for_the_original(atlas: Atlas) -> None:
    scenes = [draw_scene(atlas, np.random.default_rng(n), kinds={"one": 1}) for n in range(8)]
    images, masks = np.stack([scene.image for scene in scenes]), random_masks(scenes)
    covered = [mask[scene.regions > 0].mean() for mask, scene in zip(masks, scenes, strict=True)]
    assert max(covered) <= 0.5
    assert np.mean(covered) > 0.05
    means = [image[~mask].mean(0).round() for image, mask in zip(images, masks, strict=True)]
    colours = np.broadcast_to(np.array(means, np.uint8)[:, None, None], images.shape)
    assert inpainting_gain(Filler(colours), scenes) == pytest.approx((0.0, 0.0))
    each, pooled = inpainting_gain(Filler(images // 2 + 64), scenes)
    assert (each, pooled) > (0.0, 0.0)
    best = inpainting_gain(Filler(images), scenes)
    assert each < best[0] < 50
    assert pooled < best[1] < 50


def test_psnr_of_a_known_error() -> None:
    assert psnr(np.zeros((2, 2)), np.full((2, 2), 25.5)) == pytest.approx(20.0)

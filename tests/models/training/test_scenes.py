"""The drawn data set: what is held out, what a scene holds, and whether the measure recognises it."""

import os

import numpy as np
import pytest

from models.training.evaluate import (
    Judge,
    background,
    held_out_prompts,
    named_object_accuracy,
    nearest_colour,
    psnr,
)
from models.training.scenes import COLOURS, FONT, SIZE, Atlas, compose, draw_scene, held_out, known_glyphs

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
        scene = draw_scene(atlas, rng, two=0.0)
        name, colour = scene.caption.removesuffix(" background").split(" on a ")
        assert not held_out(name, colour)
        assert scene.short_caption == name
        assert nearest_colour(background(scene.picture)) == colour


def test_two_objects_stand_as_the_caption_says(atlas: Atlas) -> None:
    rng = np.random.default_rng(1)
    scenes = [draw_scene(atlas, rng, two=1.0) for _ in range(20)]
    assert {" left of " in s.caption for s in scenes} == {True, False}
    for scene in scenes:
        apart = np.abs(scene.picture.astype(int) - background(scene.picture)).sum(-1) > 60
        axis = 0 if " left of " in scene.caption else 1
        profile = apart.any(axis=axis)
        assert profile[: SIZE // 2].any()
        assert profile[SIZE // 2 :].any()


def test_the_same_seed_draws_the_same_scene(atlas: Atlas) -> None:
    a, b = (draw_scene(atlas, np.random.default_rng(7)) for _ in range(2))
    assert a.caption == b.caption
    assert np.array_equal(a.picture, b.picture)


def test_the_measure_recognises_what_was_drawn_and_nothing_else(atlas: Atlas) -> None:
    pairs = held_out_prompts(NAMES, 8)

    def drawn(prompts: list[str]) -> np.ndarray:
        split = (p.removesuffix(" background").split(" on a ") for p in prompts)
        return np.stack([compose(atlas, colour, [(name, 80, 60, 66)]) for name, colour in split])

    assert named_object_accuracy(Judge(atlas), pairs, drawn).top1 == 1.0

    def shuffled(prompts: list[str]) -> np.ndarray:
        return np.roll(drawn(prompts), 1, axis=0)

    assert named_object_accuracy(Judge(atlas), pairs, shuffled).top1 < 0.5


def test_psnr_of_a_known_error() -> None:
    assert psnr(np.zeros((2, 2)), np.full((2, 2), 25.5)) == pytest.approx(20.0)

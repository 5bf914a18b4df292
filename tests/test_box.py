"""The model in the box, as someone meets it who has just cloned the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.checkpoint import load
from models.training.evaluate import (
    Judge,
    background,
    held_out_prompts,
    named_object_accuracy,
    nearest_colour,
    to_pictures,
)
from models.training.scenes import FONT, Atlas
from tests.conftest import ROOT

BOX = ROOT / "weights" / "emoji"
NAMES = (BOX / "names.txt").read_text().splitlines()


def test_the_command_draws_a_red_thing_on_a_blue_background(tmp_path: Path) -> None:
    file = tmp_path / "apple.png"
    prompt = "red apple on a blue background"
    command = [sys.executable, "-m", "service.cli", "generate", prompt, "-o", str(file), "--seed", "1"]
    subprocess.run(command, cwd=ROOT, check=True)
    picture = np.asarray(Image.open(file))
    assert nearest_colour(background(picture)) == "blue"
    red, green, blue = picture[48:96, 48:80].reshape(-1, 3).mean(0)
    assert red > 2 * max(green, blue)


@pytest.mark.skipif(
    not FONT.exists() and not os.environ.get("LDM_TESTS_MUST_NOT_SKIP"),
    reason="fonts-noto-color-emoji is not installed",
)
@torch.inference_mode()
def test_most_held_out_prompts_are_recognised_and_shuffled_ones_are_not() -> None:
    bundle, judge = load(BOX), Judge(Atlas())
    pairs = held_out_prompts(NAMES, 12)
    pictures = {}

    def draw(prompts: list[str]) -> np.ndarray:
        pictures["all"] = to_pictures(bundle.sample(prompts, range(len(prompts)), 20, 3.0))
        return pictures["all"]

    accuracy = named_object_accuracy(judge, pairs, draw)
    assert accuracy.top5 >= 0.4  # 0.74 over 300 prompts
    assert accuracy.background == 1.0
    shuffled = named_object_accuracy(judge, pairs, lambda prompts: np.roll(pictures["all"], 1, axis=0))
    assert shuffled.top5 <= 0.2


def test_it_is_small_and_says_what_it_claims() -> None:
    size = sum(file.stat().st_size for file in BOX.rglob("*") if file.is_file())
    assert size < 32 * 2**20
    assert len(NAMES) >= 60
    assert (BOX / "README.md").is_file()

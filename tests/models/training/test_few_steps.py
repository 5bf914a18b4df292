"""Distillation into a LoRA: the path of the guided model, and the LoRA's file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

from models.adapters import lora
from models.latent_diffusion import as_input
from models.sampling.schedule import Schedule
from models.spec import ScheduleSpec
from models.training import presets
from models.training.few_steps import LORA_FILE, STEPS, Angles, LowRank, captions, draw_paths, save
from models.training.scenes import COLOURS, held_out
from tests.checkpoints.tiny import fill_randomly, random_model, scene_spec
from tests.helpers.numbers import relative_error


def test_a_path_has_the_timesteps_of_trailing_steps_and_those_between() -> None:
    angles = Angles(Schedule(presets.SCHEDULE))
    assert angles.path(4, 1) == [999, 749, 499, 249, -1]
    assert angles.path(4, 4)[::4] == angles.path(4, 1)
    assert len(angles.path(4, 4)) == 17


def test_a_step_is_that_of_ddim() -> None:
    """Song et al. 2020, equation 12, with eps and x_0 from v."""
    schedule = Schedule(presets.SCHEDULE)
    angles, t, to = Angles(schedule), 749, 499
    x, v = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    (a, s), (b, r) = (np.sqrt([ab, 1 - ab]) for ab in schedule.alpha_bar[[t, to]])
    expected = b * (a * x - s * v) + r * (s * x + a * v)
    stepped = angles.step(x, v, t, to)
    assert relative_error(stepped, expected) < 1e-5
    both = torch.full((2,), t), torch.full((2,), to)
    assert relative_error(angles.v_between(x, stepped, *both), v) < 1e-4


def test_models_that_do_not_predict_v_are_refused() -> None:
    with pytest.raises(ValueError, match="predict v"):
        Angles(Schedule(ScheduleSpec(final_alpha_one=True)))


def test_captions_leave_out_held_out_pairs() -> None:
    pairs = [(name, colour) for name in ("red apple", "rocket") for colour in COLOURS]
    excluded = [f"{name} on a {colour} background" for name, colour in pairs if held_out(name, colour)]
    made = captions(["red apple", "rocket"], 300, seed=0)
    assert excluded
    assert len(made) == 300
    assert not set(excluded) & set(made)
    assert {"red apple", "rocket"} & set(made)  # short captions


@torch.inference_mode()
def test_the_path_of_the_guided_model_is_that_of_sampling() -> None:
    schedule = replace(presets.SCHEDULE, timesteps=1000)
    model = random_model(replace(scene_spec(), schedule=schedule))
    data = draw_paths(model, ["red apple", "rocket"], 1, guidance_scale=2.0, seed=3)
    assert data["states"].shape[1:] == (STEPS + 1, 4, 8, 8)
    texts = captions(["red apple", "rocket"], len(data["ids"]), seed=3)
    pair = model.predictor([model.context_pair(as_input(texts[0]))], model.concat_channels(8, 8), 2.0)
    end = model.denoise(data["states"][:1, 0].float(), 16, pair)
    assert relative_error(data["states"][0, -1].float(), end[0]) < 0.05  # in bfloat16


@torch.inference_mode()
def test_the_file_of_a_lora_gives_the_same_unet(tmp_path: Path) -> None:
    model = random_model(scene_spec())
    low_rank = LowRank(model.unet, rank=3)
    x, t, context = torch.randn(2, 12, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 32)
    before = model.unet(x, t, context)
    assert torch.equal(functional_call(model.unet, low_rank.merged(model.unet), (x, t, context)), before)
    fill_randomly(low_rank, 5)
    save(low_rank, model.unet, tmp_path)
    opened = lora.open_loras({"few": tmp_path / LORA_FILE}, {"tiny": model.spec})["tiny"]["few"]
    assert not opened.ignored
    merged = functional_call(model.unet, low_rank.merged(model.unet), (x, t, context))
    assert relative_error(merged, before) > 0.05
    assert relative_error(lora.apply(model, [(opened, 1.0, 1.0)]).unet(x, t, context), merged) < 0.01

"""Guidance: rows of each step, and the formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from models.networks.unet import UNet
from models.sampling.denoiser import Denoiser
from models.sampling.guidance import StepRows, cfg_rows, cfg_run, edit_rows, guide, rescale
from models.sampling.schedule import Schedule
from tests.checkpoints.tiny import tiny_spec


@pytest.mark.parametrize(
    ("scale", "rows"),
    [(0.0, StepRows((0,))), (1.0, StepRows((1,))), (7.5, StepRows((0, 1), (7.5,)))],
)
def test_guidance_needs_two_rows_unless_one_prediction_has_no_weight(scale, rows):
    assert cfg_rows(scale) == rows


@pytest.mark.parametrize(
    ("calls", "start", "end", "guided"),
    [
        (4, 0.0, 1.0, "1111"),
        (4, 0.5, 1.0, "0011"),
        (4, 0.0, 0.5, "1100"),
        (5, 0.3, 0.7, "01100"),
        (50, 0.58, 1.0, "0" * 29 + "1" * 21),
        (3, 0.4, 0.5, "000"),
    ],
)
def test_guidance_acts_between_two_parts_of_the_run(calls, start, end, guided):
    run = cfg_run(cfg_rows(5.0), calls, start, end, rescale=0.7)
    assert "".join(str(len(step.rows) - 1) for step in run) == guided
    assert {step.rows for step in run if not step.weights} <= {(1,)}, "outside, the conditional row"
    assert all(step.rescale == 0.7 for step in run if step.weights)


def test_other_rows_are_weighted_against_the_base():
    base, first, second = torch.randn(3, 2, 4, 8, 8).unbind()
    weights = torch.tensor([2.0, -1.0])
    out = guide(base, [(first, 3.0), (second, weights)])
    assert torch.allclose(out[0], base[0] + 3 * (first[0] - base[0]) + 2 * (second[0] - base[0]))
    assert torch.allclose(out[1], base[1] + 3 * (first[1] - base[1]) - (second[1] - base[1]))


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_rescaling_is_that_of_diffusers_on_what_the_unet_predicts(prediction, phi):
    spec = tiny_spec(prediction)
    denoiser = Denoiser(UNet(spec.unet), Schedule(spec.schedule))
    alpha, sigma = torch.tensor(0.6), torch.tensor(0.8)
    x, conditional, guided = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = rescale_noise_cfg(5 * guided, conditional, phi)

    def eps(output: torch.Tensor) -> torch.Tensor:
        return {
            "epsilon": output,
            "v_prediction": alpha * output + sigma * x,
            "sample": (x - alpha * output) / sigma,
        }[prediction]

    rescaled = rescale(eps(5 * guided)[0], eps(conditional)[0], phi, denoiser.eps_offset(x[0], sigma))
    assert torch.allclose(rescaled, eps(expected)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "image"),
    [
        (7.5, 1.5),
        (1.0, 1.0),
        (7.5, 7.5),
        (4.0, 1.0),
        (0.0, 1.5),
        (1.0, 2.0),
        (0.0, 1.0),
        (0.0, 0.0),
        (3.0, 0.0),
    ],
)
def test_guidance_by_a_text_and_an_image_to_edit(text, image):
    """Brooks et al. 2023, equation 3; rows that cancel out are left out."""
    nothing, both, alone = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = nothing + image * (alone - nothing) + text * (both - alone)
    rows = edit_rows(text, image)
    base, *others = ((nothing, both, alone)[row] for row in rows.rows)
    torch.testing.assert_close(guide(base, zip(others, rows.weights, strict=True)), expected)


def test_rows_of_an_edited_image():
    assert [len(edit_rows(*scales).rows) for scales in ((7.5, 1.5), (7.5, 7.5), (7.5, 1.0), (1.0, 1.0))] == [
        3,
        2,
        2,
        1,
    ]

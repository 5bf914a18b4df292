"""Betas, alpha_bar and timesteps, against the schedulers of `diffusers`."""

import numpy as np
import pytest
from diffusers import DDIMScheduler

from models.sampling.schedule import Schedule
from models.spec import ScheduleSpec


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_alpha_bar_matches_diffusers(kind):
    schedule = Schedule(ScheduleSpec(beta_schedule=kind))
    reference = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=kind)
    assert schedule.alpha_bar.dtype == np.float64
    np.testing.assert_allclose(schedule.alpha_bar, reference.alphas_cumprod.numpy(), rtol=2e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_step_count_gives_that_many_descending_timesteps(spacing):
    schedule = Schedule(ScheduleSpec(spacing=spacing))
    for steps in range(1, 1001):
        t = schedule.timesteps(steps)
        assert len(t) == steps
        assert (np.diff(t) < 0).all()
        assert 0 <= t[-1] <= t[0] < 1000
        assert steps == 1 or 1000 - t[0] <= 1000 / steps + 100  # the run starts near pure noise


@pytest.mark.parametrize(
    ("spacing", "step_counts"),
    [
        ("leading", [*range(1, 101), 125, 200, 250, 333, 500]),
        ("trailing", [1, 3, 7, 10, 25, 30, 36, 50, 333, 1000]),
        ("linspace", [2, 10, 25, 1000]),
    ],
)
def test_timesteps_match_diffusers(spacing, step_counts):
    schedule = Schedule(ScheduleSpec())
    reference = DDIMScheduler(steps_offset=1, timestep_spacing=spacing)
    for steps in step_counts:
        reference.set_timesteps(steps)
        assert schedule.timesteps(steps, spacing).tolist() == reference.timesteps.tolist(), steps


def test_linspace_reaches_both_ends():
    t = Schedule(ScheduleSpec()).timesteps(25, "linspace")
    assert (t[0], t[-1]) == (999, 0)


def test_the_offset_is_dropped_where_it_would_lead_past_the_schedule():
    assert Schedule(ScheduleSpec(steps_offset=1)).timesteps(1000).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_outside_the_schedule_are_refused(steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        Schedule(ScheduleSpec()).timesteps(steps)


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_zero_terminal_snr_matches_diffusers(kind):
    schedule = Schedule(ScheduleSpec(beta_schedule=kind, zero_terminal_snr=True))
    reference = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule=kind, rescale_betas_zero_snr=True
    )
    assert schedule.alpha_bar[-1] == 0.0
    np.testing.assert_allclose(schedule.alpha_bar, reference.alphas_cumprod.numpy(), rtol=1e-3, atol=1e-9)

import numpy as np
import pytest
from diffusers import DDIMScheduler

from models.sampling.schedule import Schedule
from models.spec import ScheduleSpec


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_alpha_bar_is_the_references(kind):
    schedule = Schedule(ScheduleSpec(beta_schedule=kind))
    reference = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=kind)
    assert schedule.alpha_bar.dtype == np.float64
    np.testing.assert_allclose(schedule.alpha_bar, reference.alphas_cumprod.numpy(), rtol=2e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_every_number_of_steps_is_exact(spacing):
    schedule = Schedule(ScheduleSpec(spacing=spacing))
    for steps in range(1, 1001):
        assert len(schedule) - schedule.timesteps(steps)[0] <= 1000 / steps + 100
        t = schedule.timesteps(steps)
        assert len(t) == steps
        assert (np.diff(t) < 0).all()  # descending and distinct
        assert 0 <= t[-1] <= t[0] < 1000


@pytest.mark.parametrize("steps", [*range(1, 101), 125, 200, 250, 333, 500])
def test_leading_is_the_references_stride_where_that_leaves_out_little(steps):
    reference = DDIMScheduler(steps_offset=1, timestep_spacing="leading")
    reference.set_timesteps(steps)
    assert Schedule(ScheduleSpec()).timesteps(steps).tolist() == reference.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 25, 30, 36, 50, 333, 1000])
def test_trailing_is_the_references(steps):
    reference = DDIMScheduler(timestep_spacing="trailing")
    reference.set_timesteps(steps)
    assert Schedule(ScheduleSpec()).timesteps(steps, "trailing").tolist() == reference.timesteps.tolist()


def test_all_steps_drop_the_offset():
    assert Schedule(ScheduleSpec(steps_offset=1)).timesteps(1000).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_outside_the_table_are_refused(steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        Schedule(ScheduleSpec()).timesteps(steps)


@pytest.mark.parametrize("steps", [2, 10, 25, 1000])
def test_linspace_is_that_of_the_reference_and_reaches_both_ends(steps):
    reference = DDIMScheduler(timestep_spacing="linspace")
    reference.set_timesteps(steps)
    t = Schedule(ScheduleSpec()).timesteps(steps, "linspace")
    assert t.tolist() == reference.timesteps.tolist()
    assert (t[0], t[-1]) == (999, 0)

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from models.samplers import keep, plan, step
from models.schedule import Schedule
from models.spec import ScheduleSpec

SHAPE = (2, 4, 8, 8)


def eps_of(x, t):
    """Stands for a network: any smooth function of both will do."""
    return torch.tanh(x) + 0.3 * torch.sin(x * 3 + t / 100)


@pytest.mark.parametrize("final_alpha_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 10), ("leading", 50), ("trailing", 10), ("trailing", 25)]
)
def test_ddim_follows_the_reference(spacing, steps, eta, final_alpha_one):
    spec = ScheduleSpec(spacing=spacing, final_alpha_one=final_alpha_one)
    reference = DDIMScheduler(
        beta_start=spec.beta_start, beta_end=spec.beta_end, beta_schedule=spec.beta_schedule,
        clip_sample=False, set_alpha_to_one=final_alpha_one, steps_offset=1, timestep_spacing=spacing,
    )  # fmt: skip
    reference.set_timesteps(steps)
    table = plan(Schedule(spec), "ddim", steps, eta)
    assert table.timesteps.tolist() == reference.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(SHAPE, generator=generator)
    for line, t in zip(torch.from_numpy(table.lines), reference.timesteps, strict=True):
        noise = torch.randn(SHAPE, generator=generator)
        ours = step(ours, eps_of(ours, t), line.expand(2, -1), noise)
        theirs = reference.step(eps_of(theirs, t), t, theirs, eta=eta, variance_noise=noise).prev_sample
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_every_row_has_a_line_of_its_own():
    lines = torch.from_numpy(plan(Schedule(ScheduleSpec()), "ddim", 5, eta=1.0).lines)
    x, eps, noise = torch.randn(3, 5, 4, 8, 8).unbind()
    together = step(x, eps, lines, noise)
    for row in range(5):
        alone = slice(row, row + 1)
        assert torch.equal(together[alone], step(x[alone], eps[alone], lines[alone], noise[alone]))


def test_the_true_noise_leads_back_to_the_picture():
    schedule = Schedule(ScheduleSpec(final_alpha_one=True))
    table = plan(schedule, "ddim", 7)
    x_0, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    ab = schedule.alpha_bar[int(table.timesteps[0])]
    x = ab**0.5 * x_0 + (1 - ab) ** 0.5 * noise
    for line in torch.from_numpy(table.lines):
        x = step(x, noise, line[None])
    torch.testing.assert_close(x, x_0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_number_of_steps_has_finite_lines(eta):
    schedule = Schedule(ScheduleSpec())
    for steps in range(1, 1001):
        table = plan(schedule, "ddim", steps, eta)
        assert len(table) == steps
        assert np.isfinite(table.lines).all()


def test_low_precision_rows_step_in_float32():
    lines = torch.from_numpy(plan(Schedule(ScheduleSpec()), "ddim", 5).lines)[:1]
    x, eps = torch.randn(2, 1, 4, 8, 8).bfloat16().unbind()
    assert step(x, eps, lines).dtype == torch.float32


@pytest.mark.parametrize(
    ("sampler", "eta"), [("euler", 0.0), ("ddim", -0.1), ("ddim", 1.1), ("ddim", float("nan"))]
)
def test_what_cannot_be_planned_is_refused(sampler, eta):
    with pytest.raises(ValueError, match=r"sampler|eta"):
        plan(Schedule(ScheduleSpec()), sampler, 10, eta)


def test_strength_leaves_out_the_first_steps():
    schedule = Schedule(ScheduleSpec())
    whole, part = plan(schedule, "ddim", 20), plan(schedule, "ddim", 20, strength=0.3)
    assert len(part) == 6
    assert np.array_equal(part.lines, whole.lines[14:])
    assert len(plan(schedule, "ddim", 20, strength=0.001)) == 1


def test_a_run_from_a_picture_and_its_noise_leads_back_to_it():
    table = plan(Schedule(ScheduleSpec(final_alpha_one=True)), "ddim", 10, strength=0.5)
    z, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    signal, sigma = table.start
    x = signal * z + sigma * noise
    for line in torch.from_numpy(table.lines):
        x = step(x, noise, line[None])
    torch.testing.assert_close(x, z, rtol=0, atol=1e-4)


def test_what_is_known_is_as_noisy_as_the_rest_and_clean_at_the_end():
    table = plan(Schedule(ScheduleSpec()), "ddim", 10)
    z, noise, painted = torch.randn(3, 1, 4, 8, 8).unbind()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    for line, t_next in zip(torch.from_numpy(table.lines), table.timesteps[1:], strict=False):
        ab = Schedule(ScheduleSpec()).alpha_bar[int(t_next)]
        x = keep(painted, z, noise, mask, line[None])
        assert torch.equal(x[..., :4], painted[..., :4])
        known = ab**0.5 * z + (1 - ab) ** 0.5 * noise
        torch.testing.assert_close(x[..., 4:], known[..., 4:])
    last = keep(painted, z, noise, mask, torch.from_numpy(table.lines[-1:]))
    assert torch.equal(last[..., 4:], z[..., 4:])


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match="strength"):
        plan(Schedule(ScheduleSpec()), "ddim", 10, strength=strength)

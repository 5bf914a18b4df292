import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from models.sampling.denoiser import Denoiser
from models.sampling.samplers import OWN_SPACING, SAMPLERS, max_steps, plan
from models.sampling.schedule import Schedule
from models.sampling.step import blend_unmasked, step
from models.spec import ScheduleSpec

SHAPE = (2, 4, 8, 8)


def eps_of(x, t):
    """Stands for a network: any smooth function of both will do."""
    return torch.tanh(x) + 0.3 * torch.sin(x * 3 + t / 100)


@pytest.mark.parametrize("final_alpha_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("leading", 10), ("leading", 50), ("trailing", 10), ("trailing", 25)],
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
    theirs = torch.randn(SHAPE, generator=generator)
    ours = theirs[:, None]
    for line, t in zip(torch.from_numpy(table.coeffs), reference.timesteps, strict=True):
        noise = torch.randn(SHAPE, generator=generator)
        ours = step(ours, eps_of(ours[:, 0], t), line.expand(2, -1), noise)
        theirs = reference.step(eps_of(theirs, t), t, theirs, eta=eta, variance_noise=noise).prev_sample
        assert (ours[:, 0] - theirs).norm() <= 1e-4 * theirs.norm()


FOLLOWED = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler_exponential": (EulerDiscreteScheduler, {"use_exponential_sigmas": True}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "euler_ancestral_karras": (EulerAncestralDiscreteScheduler, {}),
    "euler_ancestral_exponential": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m_exponential": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
}
# Theirs go down by 1000 // steps from wherever they are, which with other points between is not where they
# ask next. There, what they compute is compared on a schedule that has our points and no others.
STRIDING = ("ddim", "plms")
ON_RATIO = tuple(name for name in SAMPLERS if name.startswith("euler"))  # published on x / alpha
# Diffusers has no option for these: the reference takes the noise levels of another sampler.
SAME_NOISE_LEVELS = {
    "euler_ancestral_karras": "euler_karras",
    "euler_ancestral_exponential": "euler_exponential",
    "dpmpp_2m_exponential": "euler_exponential",
}
SPACINGS = [("leading", 10), ("leading", 30), ("trailing", 8), ("trailing", 30), ("linspace", 10)]


def test_every_sampler_is_followed():
    assert {*FOLLOWED} == set(SAMPLERS)


class Network(torch.nn.Module):
    """Any smooth function, for eps and for v."""

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, context=None, *others):
        return eps_of(x, t[:, None, None, None])


def reference_of(sampler, spec, spacing, steps):
    """Their scheduler, and the timesteps that the network is asked at."""
    kind, options = FOLLOWED[sampler]
    options = options | {"prediction_type": spec.prediction}
    if sampler in STRIDING and (spacing == "linspace" or (spacing == "trailing" and 1000 % steps)):
        t = Schedule(spec).timesteps(steps, spacing)
        alpha_bar = Schedule(spec).alpha_bar[t[::-1]]
        betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        reference = kind(num_train_timesteps=steps, trained_betas=betas, **options)
        reference.set_timesteps(steps)
        return reference, [float(t[::-1][index]) for index in reference.timesteps]
    spaced = {} if sampler == "lcm" else {"timestep_spacing": spacing, "steps_offset": 1}
    reference = kind(
        beta_start=spec.beta_start, beta_end=spec.beta_end, beta_schedule=spec.beta_schedule,
        **spaced, **options,
    )  # fmt: skip
    reference.set_timesteps(steps)
    if sampler in SAME_NOISE_LEVELS:
        other, _ = reference_of(SAME_NOISE_LEVELS[sampler], spec, spacing, steps)
        reference.sigmas, reference.timesteps = other.sigmas, other.timesteps
    return reference, reference.timesteps.tolist()


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # theirs, with numpy 2
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", FOLLOWED)
@pytest.mark.parametrize(("spacing", "steps"), SPACINGS)
@torch.no_grad()
def test_samplers_follow_their_references(sampler, spacing, steps, prediction, monkeypatch):
    spec = ScheduleSpec(final_alpha_one=True, prediction=prediction)
    reference, asked = reference_of(sampler, spec, spacing, steps)
    schedule, network = Schedule(spec), Network()
    table = plan(schedule, sampler, steps, spacing=None if sampler in OWN_SPACING else spacing)
    np.testing.assert_allclose(table.timesteps, asked, rtol=0, atol=2e-3)
    fresh = iter(torch.randn(steps + 2, *SHAPE, generator=torch.Generator().manual_seed(1)))
    for module in ("ddpm", "lcm", "euler_ancestral_discrete"):
        monkeypatch.setattr(
            f"diffusers.schedulers.scheduling_{module}.randn_tensor", lambda *a, **k: next(fresh)
        )
    noises = torch.randn(steps + 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    ours = torch.zeros(2, 1 + table.history, *SHAPE[1:])
    ours[:, 0] = x
    alphas = [*table.coeffs[1:, 1], 1.0]
    theirs = x / table.coeffs[0, 1] if sampler in ON_RATIO else x
    for index, t in enumerate(reference.timesteps):
        lines = torch.from_numpy(table.coeffs[index]).float().expand(2, -1)
        told = torch.full((2,), asked[index])
        scaled = reference.scale_model_input(theirs, t)
        theirs = reference.step(network(scaled, told), t, theirs).prev_sample
        noise = noises[index] if table.needs_noise[index] else None
        eps = Denoiser(network, schedule)(ours[:, 0], lines[:, 0], alpha_sigma=lines[:, 1:3])
        ours = step(ours, eps, lines, noise)
        expected = theirs * alphas[index] if sampler in ON_RATIO else theirs
        assert (ours[:, 0] - expected).norm() <= 1e-4 * expected.norm(), index


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in OWN_SPACING])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_spacing_may_be_the_schedules_or_the_runs(sampler, spacing):
    own, given = Schedule(ScheduleSpec(spacing=spacing)), Schedule(ScheduleSpec())
    lines = plan(own, sampler, 12).coeffs
    assert np.array_equal(lines, plan(given, sampler, 12, spacing=spacing).coeffs)
    assert np.array_equal(lines, plan(given, sampler, 12).coeffs) == (spacing == "leading")
    for steps in (2, 3, 333, 999, 1000):
        assert np.isfinite(plan(given, sampler, steps, spacing=spacing).coeffs).all()


@pytest.mark.parametrize("sampler", OWN_SPACING)
def test_a_sampler_with_a_spacing_of_its_own_takes_no_other(sampler):
    with pytest.raises(ValueError, match="spacing"):
        plan(Schedule(ScheduleSpec()), sampler, 10, spacing="trailing")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_leads_back_to_the_picture_by_its_true_noise(sampler):
    schedule = Schedule(ScheduleSpec(final_alpha_one=True))
    table = plan(schedule, sampler, 9)
    z, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    state = torch.zeros(1, 1 + table.history, 4, 8, 8)
    state[:, 0] = table.start[0] * z + table.start[1] * noise
    for row in table.coeffs:
        line = torch.from_numpy(row)
        eps = (state[:, 0] - line[1] * z) / line[2]  # what leads to z from wherever the fresh noise has led
        fresh = torch.randn(z.shape) if line[3] else None
        state = step(state, eps.float(), line[None], fresh)
    torch.testing.assert_close(state[:, 0], z, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_any_number_of_steps_and_any_share_of_them(sampler):
    schedule = Schedule(ScheduleSpec())
    for spacing in (None,) if sampler in OWN_SPACING else ("leading", "trailing", "linspace"):
        for steps in (1, 2, 3, 7, 50, 333, 1000):
            if steps <= max_steps(sampler, 1000):
                for strength in (1.0, 0.4, 0.01, 0.001):
                    table = plan(schedule, sampler, steps, strength=strength, spacing=spacing)
                    assert np.isfinite(table.coeffs).all()
    with pytest.raises(ValueError, match="steps"):
        plan(schedule, sampler, max_steps(sampler, 1000) + 1)


def test_every_row_has_a_line_of_its_own():
    lines = torch.from_numpy(plan(Schedule(ScheduleSpec()), "ddim", 5, eta=1.0).coeffs)
    x, eps, noise = torch.randn(3, 5, 4, 8, 8).unbind()
    together = step(x[:, None], eps, lines, noise)
    for row in range(5):
        alone = slice(row, row + 1)
        assert torch.equal(together[alone], step(x[alone, None], eps[alone], lines[alone], noise[alone]))


def test_the_true_noise_leads_back_to_the_picture():
    schedule = Schedule(ScheduleSpec(final_alpha_one=True))
    table = plan(schedule, "ddim", 7)
    x_0, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    ab = schedule.alpha_bar[int(table.timesteps[0])]
    x = ab**0.5 * x_0 + (1 - ab) ** 0.5 * noise
    for line in torch.from_numpy(table.coeffs):
        x = step(x[:, None], noise, line[None])[:, 0]
    torch.testing.assert_close(x, x_0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_number_of_steps_has_finite_lines(eta):
    schedule = Schedule(ScheduleSpec())
    for steps in range(1, 1001):
        table = plan(schedule, "ddim", steps, eta)
        assert len(table) == steps
        assert np.isfinite(table.coeffs).all()


def test_low_precision_rows_step_in_float32():
    lines = torch.from_numpy(plan(Schedule(ScheduleSpec()), "ddim", 5).coeffs)[:1]
    x, eps = torch.randn(2, 1, 4, 8, 8).bfloat16().unbind()
    assert step(x[:, None], eps, lines).dtype == torch.float32


@pytest.mark.parametrize(
    ("sampler", "eta"),
    [("magic", 0.0), ("euler", 0.5), ("ddim", -0.1), ("ddim", 1.1), ("ddim", float("nan"))],
)
def test_what_cannot_be_planned_is_refused(sampler, eta):
    with pytest.raises(ValueError, match=r"sampler|eta"):
        plan(Schedule(ScheduleSpec()), sampler, 10, eta)


def test_strength_leaves_out_the_first_steps():
    schedule = Schedule(ScheduleSpec())
    whole, part = plan(schedule, "ddim", 20), plan(schedule, "ddim", 20, strength=0.3)
    assert len(part) == 6
    assert np.array_equal(part.coeffs, whole.coeffs[14:])
    assert len(plan(schedule, "ddim", 20, strength=0.001)) == 1


def test_a_run_from_a_picture_and_its_noise_leads_back_to_it():
    table = plan(Schedule(ScheduleSpec(final_alpha_one=True)), "ddim", 10, strength=0.5)
    z, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    signal, sigma = table.start
    x = signal * z + sigma * noise
    for line in torch.from_numpy(table.coeffs):
        x = step(x[:, None], noise, line[None])[:, 0]
    torch.testing.assert_close(x, z, rtol=0, atol=1e-4)


def test_what_is_known_is_as_noisy_as_the_rest_and_clean_at_the_end():
    table = plan(Schedule(ScheduleSpec()), "ddim", 10)
    z, noise, painted = torch.randn(3, 1, 4, 8, 8).unbind()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    for line, t_next in zip(torch.from_numpy(table.coeffs), table.timesteps[1:], strict=False):
        ab = Schedule(ScheduleSpec()).alpha_bar[int(t_next)]
        x = blend_unmasked(painted, z, noise, mask, line[None])
        assert torch.equal(x[..., :4], painted[..., :4])
        known = ab**0.5 * z + (1 - ab) ** 0.5 * noise
        torch.testing.assert_close(x[..., 4:], known[..., 4:])
    last = blend_unmasked(painted, z, noise, mask, torch.from_numpy(table.coeffs[-1:]))
    assert torch.equal(last[..., 4:], z[..., 4:])


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match="strength"):
        plan(Schedule(ScheduleSpec()), "ddim", 10, strength=strength)

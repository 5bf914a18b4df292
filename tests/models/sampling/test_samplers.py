"""Every sampler against the scheduler of `diffusers` that implements it, and properties of all plans."""

from itertools import product

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
from models.sampling.samplers import FIXED_SPACING, OWN_SPACING, SAMPLERS, max_steps, plan
from models.sampling.schedule import Schedule
from models.sampling.step import blend_unmasked, step
from models.spec import ScheduleSpec
from tests.helpers import k_diffusion

SHAPE = (2, 4, 8, 8)


def eps_of(x, t):
    """In place of a UNet: any smooth function of both."""
    return torch.tanh(x) + 0.3 * torch.sin(x * 3 + t / 100)


def test_ddim_with_eta_matches_diffusers():
    spacings = (("leading", 10), ("leading", 50), ("trailing", 10), ("trailing", 25))
    for run in product(spacings, (0.0, 0.5, 1.0), (False, True)):
        (spacing, steps), eta, final_alpha_one = run
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
            assert (ours[:, 0] - theirs).norm() <= 1e-4 * theirs.norm(), run


REFERENCES = {
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
# These compute the next timestep as 1000 // steps lower, which is wrong for unevenly spaced timesteps. There
# they are compared on a schedule that has our timesteps and no others.
STRIDING = ("ddim", "plms")
ON_RATIO = tuple(name for name in SAMPLERS if name.startswith("euler"))  # published on x / alpha
# Diffusers has no option for these: the reference takes the noise levels of another sampler.
SAME_NOISE_LEVELS = {
    "euler_ancestral_karras": "euler_karras",
    "euler_ancestral_exponential": "euler_exponential",
    "dpmpp_2m_exponential": "euler_exponential",
}
SPACINGS = [("leading", 10), ("leading", 30), ("trailing", 8), ("trailing", 30), ("linspace", 10)]


def test_every_sampler_has_a_reference():
    assert {*REFERENCES, *k_diffusion.SAMPLERS, "tcd"} == set(SAMPLERS)  # the latter in test_k_samplers.py


class Network(torch.nn.Module):
    """Any smooth function, for eps and for v."""

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, context=None, *others):
        return eps_of(x, t[:, None, None, None])


def reference_of(sampler, spec, spacing, steps):
    """The scheduler of diffusers, and the timesteps of its network calls."""
    kind, options = REFERENCES[sampler]
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
@pytest.mark.parametrize("sampler", REFERENCES)
@torch.no_grad()
def test_whole_runs_match_diffusers(sampler, prediction, monkeypatch):
    for spacing, steps in SPACINGS:
        compare_run(sampler, spacing, steps, prediction, monkeypatch)


def compare_run(sampler, spacing, steps, prediction, monkeypatch):
    spec = ScheduleSpec(final_alpha_one=True, prediction=prediction)
    reference, called = reference_of(sampler, spec, spacing, steps)
    schedule, network = Schedule(spec), Network()
    table = plan(schedule, sampler, steps, spacing=None if sampler in OWN_SPACING else spacing)
    np.testing.assert_allclose(table.timesteps, called, rtol=0, atol=2e-3)
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
        t_called = torch.full((2,), called[index])
        scaled = reference.scale_model_input(theirs, t)
        theirs = reference.step(network(scaled, t_called), t, theirs).prev_sample
        noise = noises[index] if table.needs_noise[index] else None
        eps = Denoiser(network, schedule)(ours[:, 0], lines[:, 0], alpha_sigma=lines[:, 1:3])
        ours = step(ours, eps, lines, noise)
        expected = theirs * alphas[index] if sampler in ON_RATIO else theirs
        assert (ours[:, 0] - expected).norm() <= 1e-4 * expected.norm(), (spacing, steps, index)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in OWN_SPACING])
def test_a_requested_spacing_overrides_the_schedules(sampler):
    default = Schedule(ScheduleSpec())  # leading
    for spacing in ("leading", "trailing", "linspace"):
        coeffs = plan(Schedule(ScheduleSpec(spacing=spacing)), sampler, 12).coeffs
        assert np.array_equal(coeffs, plan(default, sampler, 12, spacing=spacing).coeffs)
        assert np.array_equal(coeffs, plan(default, sampler, 12).coeffs) == (spacing == "leading")


def test_samplers_with_a_fixed_spacing_refuse_another():
    for sampler in FIXED_SPACING:
        with pytest.raises(ValueError, match="spacing"):
            plan(Schedule(ScheduleSpec()), sampler, 10, spacing="trailing")


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "tcd"])  # it ends at timestep 0
def test_every_sampler_recovers_the_image_from_its_true_noise(sampler):
    schedule = Schedule(ScheduleSpec(final_alpha_one=True))
    table = plan(schedule, sampler, 9)
    z, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    state = torch.zeros(1, 1 + table.history, 4, 8, 8)
    state[:, 0] = table.start[0] * z + table.start[1] * noise
    for row in table.coeffs:
        line = torch.from_numpy(row)
        eps = (state[:, 0] - line[1] * z) / line[2]  # the true noise of x, wherever fresh noise has led
        fresh = torch.randn(z.shape) if line[3] else None
        state = step(state, eps.float(), line[None], fresh)
    torch.testing.assert_close(state[:, 0], z, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_count_and_strength_gives_finite_coefficients(sampler):
    schedule = Schedule(ScheduleSpec())
    for spacing in (None,) if sampler in OWN_SPACING else ("leading", "trailing", "linspace"):
        for steps in (1, 2, 3, 7, 50, 333, 999, 1000):
            if steps <= max_steps(sampler, 1000):
                for strength in (1.0, 0.4, 0.01, 0.001):
                    table = plan(schedule, sampler, steps, strength=strength, spacing=spacing)
                    assert np.isfinite(table.coeffs).all()
    with pytest.raises(ValueError, match="steps"):
        plan(schedule, sampler, max_steps(sampler, 1000) + 1)


def test_rows_of_a_batch_do_not_affect_each_other():
    lines = torch.from_numpy(plan(Schedule(ScheduleSpec()), "ddim", 5, eta=1.0).coeffs)
    x, eps, noise = torch.randn(3, 5, 4, 8, 8).unbind()
    together = step(x[:, None], eps, lines, noise)
    for row in range(5):
        alone = slice(row, row + 1)
        assert torch.equal(together[alone], step(x[alone, None], eps[alone], lines[alone], noise[alone]))


def test_steps_are_computed_in_float32():
    lines = torch.from_numpy(plan(Schedule(ScheduleSpec()), "ddim", 5).coeffs)[:1]
    x, eps = torch.randn(2, 1, 4, 8, 8).bfloat16().unbind()
    assert step(x[:, None], eps, lines).dtype == torch.float32


@pytest.mark.parametrize(
    ("sampler", "eta"),
    [("magic", 0.0), ("euler", 0.5), ("ddim", -0.1), ("ddim", 1.1), ("ddim", float("nan"))],
)
def test_unknown_samplers_and_invalid_eta_are_refused(sampler, eta):
    with pytest.raises(ValueError, match=r"sampler|eta"):
        plan(Schedule(ScheduleSpec()), sampler, 10, eta)


def test_strength_skips_the_first_steps():
    schedule = Schedule(ScheduleSpec())
    whole, part = plan(schedule, "ddim", 20), plan(schedule, "ddim", 20, strength=0.3)
    assert len(part) == 6
    assert np.array_equal(part.coeffs, whole.coeffs[14:])
    assert len(plan(schedule, "ddim", 20, strength=0.001)) == 1


def test_image_to_image_recovers_the_image_from_its_true_noise():
    table = plan(Schedule(ScheduleSpec(final_alpha_one=True)), "ddim", 10, strength=0.5)
    z, noise = torch.randn(2, 1, 4, 8, 8).unbind()
    signal, sigma = table.start
    x = signal * z + sigma * noise
    for line in torch.from_numpy(table.coeffs):
        x = step(x[:, None], noise, line[None])[:, 0]
    torch.testing.assert_close(x, z, rtol=0, atol=1e-4)


def test_blending_restores_unmasked_latents_at_the_noise_of_the_next_step():
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
def test_strength_outside_0_to_1_is_refused(strength):
    with pytest.raises(ValueError, match="strength"):
        plan(Schedule(ScheduleSpec()), "ddim", 10, strength=strength)

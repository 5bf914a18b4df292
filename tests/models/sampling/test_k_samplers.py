"""Samplers of k-diffusion, the spacings by noise levels, TCD, and schedules with zero terminal SNR."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from models.sampling.denoiser import Denoiser
from models.sampling.noise_path import schedule_ratios
from models.sampling.samplers import SAMPLERS, TWO_CALL_SAMPLERS, plan, spacings_of, unet_calls
from models.sampling.schedule import Schedule
from models.sampling.spacings import NOISE_SPACINGS
from models.sampling.step import step
from models.spec import ScheduleSpec
from tests.helpers import k_diffusion

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_"),  # of diffusers, with numpy 2
    pytest.mark.slow,
]

SHAPE = (2, 4, 8, 8)


class Network(torch.nn.Module):
    """Any smooth function of x and t, for eps and for v."""

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, context=None, *others):
        return torch.tanh(x) + 0.3 * torch.sin(x * 3 + t[:, None, None, None] / 100)


def random(count, seed):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def run(schedule, table, noises, network=None, x=None):
    """x after every UNet call of a run in float32, as the service computes it."""
    network, fresh = network or Network(), iter(noises)
    state = torch.zeros(len(noises[0]), 1 + table.history, *noises[0].shape[1:])
    state[:, 0] = random(1, 0)[0] if x is None else x
    for line, needs_noise in zip(torch.from_numpy(table.coeffs).float(), table.needs_noise, strict=True):
        lines = line.expand(len(state), -1)
        eps = Denoiser(network, schedule)(state[:, 0], lines[:, 0], alpha_sigma=lines[:, 1:3])
        state = step(state, eps, lines, next(fresh) if needs_noise else None)
        yield state[:, 0]


def after_steps(outputs, sampler):
    """Of the x after every call, those after every step."""
    outputs = list(outputs)
    return [*outputs[1::2], outputs[-1]] if sampler in TWO_CALL_SAMPLERS else outputs


def close(ours, expected, tolerance=1e-4):
    return (ours - expected).norm() <= tolerance * expected.norm()


def denoiser_of(schedule):
    """k-diffusion's denoised(y, sigma), in float64."""
    table, network = np.log(schedule_ratios(schedule)), Network().double()

    def denoised(y, sigma):
        alpha = 1 / math.sqrt(1 + sigma**2)
        t = float(np.interp(math.log(sigma), table, np.arange(len(table))))
        eps = network(alpha * y, torch.full((len(y),), t, dtype=torch.float64))
        if schedule.spec.prediction == "v_prediction":
            eps = alpha * eps + alpha * sigma * alpha * y
        return y - sigma * eps

    return denoised


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", *NOISE_SPACINGS])
@pytest.mark.parametrize("sampler", k_diffusion.SAMPLERS)
@torch.no_grad()
def test_whole_runs_match_k_diffusion(sampler, spacing, prediction):
    schedule = Schedule(ScheduleSpec(prediction=prediction))
    for steps in (1, 2, 9, 25):
        # Noise levels of a sampler with the same path that calls the UNet once a step.
        same = {"dpmpp_2m_sde": "dpmpp_2m", "dpmpp_3m_sde": "dpmpp_2m"}.get(sampler, "euler")
        lines = plan(schedule, same, steps, spacing=spacing).coeffs
        sigmas = [*(lines[:, 2] / lines[:, 1]).tolist(), 0.0]
        table, noises = plan(schedule, sampler, steps, spacing=spacing), random(2 * steps, 1)
        assert len(table) == unet_calls(sampler, steps)
        ours = after_steps(run(schedule, table, noises), sampler)
        y = random(1, 0)[0].double() / lines[0, 1]
        noise = k_diffusion.Brownian(noises.double())
        theirs = list(k_diffusion.SAMPLERS[sampler](denoiser_of(schedule), y, sigmas, noise))
        for index, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            assert close(x, y / math.sqrt(1 + sigmas[index + 1] ** 2)), (steps, index)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ON_RATIO = ("euler", "euler_ancestral", "heun", "dpm2", "dpm2_ancestral")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        ("heun", HeunDiscreteScheduler),
        ("dpm2", KDPM2DiscreteScheduler),
        ("dpm2_ancestral", KDPM2AncestralDiscreteScheduler),
        ("dpmpp_2m_sde", DPMSolverMultistepScheduler),
    ],
)
@torch.no_grad()
def test_whole_runs_match_diffusers(sampler, kind, prediction, monkeypatch):
    schedule = Schedule(ScheduleSpec(prediction=prediction))
    options = {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}
    for spacing, steps in (("leading", 10), ("trailing", 8), ("linspace", 10)):
        reference = kind(
            **BETAS, **options, prediction_type=prediction, timestep_spacing=spacing, steps_offset=1
        )
        compare(
            reference, schedule, plan(schedule, sampler, steps, spacing=spacing), steps, sampler, monkeypatch
        )


def compare(reference, schedule, table, steps, sampler, monkeypatch, **options):
    """Ours and a scheduler of diffusers, from the same noise, after every UNet call."""
    reference.set_timesteps(steps)
    np.testing.assert_allclose(table.timesteps, reference.timesteps.numpy(), rtol=0, atol=3e-3)
    noises = random(2 * steps, 1)
    fresh = iter(noises)
    for module in (
        "ddpm", "lcm", "tcd", "euler_ancestral_discrete", "k_dpm_2_ancestral_discrete", "dpmsolver_multistep",
    ):  # fmt: skip
        monkeypatch.setattr(
            f"diffusers.schedulers.scheduling_{module}.randn_tensor",
            lambda *args, **kwargs: next(fresh, torch.zeros(SHAPE)),
        )
    ours = list(run(schedule, table, noises))
    alphas = np.append(table.coeffs[:-1, 4], 1.0)  # after each call
    start = table.start[0] if sampler in ON_RATIO else 1.0
    theirs, network = random(1, 0)[0] / start, Network()
    for index, t in enumerate(reference.timesteps):
        scaled = reference.scale_model_input(theirs, t)
        out = network(scaled, torch.full((2,), float(table.timesteps[index])))
        theirs = reference.step(out, t, theirs, **options).prev_sample
        expected = theirs * alphas[index] if sampler in ON_RATIO else theirs
        assert close(ours[index], expected), index


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_tcd_matches_diffusers(eta, monkeypatch):
    schedule = Schedule(ScheduleSpec(final_alpha_one=True))
    for steps in (1, 4, 8, 50):
        table = plan(schedule, "tcd", steps, eta)
        compare(TCDScheduler(**BETAS), schedule, table, steps, "tcd", monkeypatch, eta=eta)


@pytest.mark.parametrize(
    ("spacing", "option"), [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas")]
)
def test_karras_and_exponential_spacing_match_diffusers(spacing, option):
    reference = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace", **{option: True})
    reference.set_timesteps(12)
    lines = plan(Schedule(ScheduleSpec()), "euler", 12, spacing=spacing).coeffs
    np.testing.assert_allclose(lines[:, 2] / lines[:, 1], reference.sigmas[:-1], rtol=2e-5)
    np.testing.assert_allclose(lines[:, 0], reference.timesteps, atol=2e-3)


def test_beta_spacing_has_the_quantiles_of_the_beta_distribution():
    """scipy.stats.beta.ppf([1, .75, .5, .25, 0], 0.6, 0.6), between the ends of the noise levels."""
    quantiles = np.array([1.0, 0.824319621347305, 0.5, 0.17568037865269498, 0.0])
    lines = plan(Schedule(ScheduleSpec()), "euler", 5, spacing="beta").coeffs
    table = schedule_ratios(Schedule(ScheduleSpec()))
    expected = table[0] + quantiles * (table[-1] - table[0])
    np.testing.assert_allclose(lines[:, 2] / lines[:, 1], expected, rtol=1e-8)


def test_sgm_uniform_and_simple_spacing_choose_timesteps_from_the_last():
    schedule = Schedule(ScheduleSpec())
    uniform = plan(schedule, "euler", 4, spacing="sgm_uniform").timesteps
    assert uniform.tolist() == [999, 749.25, 499.5, 249.75]
    assert plan(schedule, "euler", 3, spacing="simple").timesteps.tolist() == [999, 666, 333]


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "karras" in spacings_of(name)])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_spacings_by_noise_levels_suit_every_step_count(sampler, zero_terminal_snr):
    for spec in (
        ScheduleSpec(zero_terminal_snr=zero_terminal_snr),
        ScheduleSpec(zero_terminal_snr=zero_terminal_snr, prediction="v_prediction"),
    ):
        for spacing in NOISE_SPACINGS:
            for steps in (1, 2, 3, 50, 1000):
                table = plan(Schedule(spec), sampler, steps, spacing=spacing)
                assert len(table) == unet_calls(sampler, steps)
                assert np.isfinite(table.coeffs).all()
            with pytest.raises(ValueError, match="steps"):
                plan(Schedule(spec), sampler, 1001, spacing=spacing)


ZERO_SNR = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}


@pytest.mark.parametrize("sampler", ZERO_SNR)
@torch.no_grad()
def test_zero_terminal_snr_matches_diffusers(sampler, monkeypatch):
    spec = ScheduleSpec(final_alpha_one=True, prediction="v_prediction", zero_terminal_snr=True)
    kind, options = ZERO_SNR[sampler]
    own = sampler in ("lcm", "tcd")
    reference = kind(
        **BETAS, **options, prediction_type="v_prediction", rescale_betas_zero_snr=True,
        **({} if own else {"timestep_spacing": "trailing"}),
    )  # fmt: skip
    table = plan(Schedule(spec), sampler, 10, spacing=None if own else "trailing")
    compare(
        reference,
        Schedule(spec),
        table,
        10,
        sampler,
        monkeypatch,
        **({"eta": 0.0} if sampler == "tcd" else {}),
    )


class TrueV(torch.nn.Module):
    """Predicts the v that leads from any x to a latent z."""

    def __init__(self, schedule, z):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))
        self.table, self.z = schedule_ratios(schedule), z

    def forward(self, x, t, *others):
        places = np.arange(len(self.table))
        ratio = np.exp(np.interp(t.numpy(), places, np.log(self.table)))[:, None, None, None]
        alpha, sigma = 1 / np.sqrt(1 + ratio**2), ratio / np.sqrt(1 + ratio**2)
        return ((torch.from_numpy(alpha) * x - self.z) / torch.from_numpy(sigma)).float()


# TCD ends at timestep 0; PLMS extrapolates v, which is not constant even where eps is.
INEXACT = {"tcd": 0.15, "plms": 0.1}


@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.no_grad()
def test_every_sampler_starts_from_pure_noise(sampler):
    spec = ScheduleSpec(final_alpha_one=True, prediction="v_prediction", zero_terminal_snr=True)
    schedule, z = Schedule(spec), random(1, 3)[0]
    for spacing in spacings_of(sampler) or (None,):
        table = plan(schedule, sampler, 9, spacing=spacing)
        assert np.isfinite(table.coeffs).all()
        *_, x = run(schedule, table, random(20, 1), TrueV(schedule, z))
        torch.testing.assert_close(x, z, rtol=0, atol=INEXACT.get(sampler, 5e-3))

"""Whole DDIM and PLMS runs as the latent diffusion paper's code makes them, written again here in float64.

It visits range(0, 1000, 1000 // S) + 1, which is S timesteps of the schedule only where S divides 1000. For
other step counts it visits too many timesteps, or one past the schedule; ours takes exactly S.
"""

import numpy as np
import pytest
import torch

from models.sampling.samplers import SAMPLERS, max_steps, plan, unet_calls
from models.sampling.schedule import Schedule
from models.sampling.step import step
from models.sampling.table import ALPHA, COMBO_START
from models.spec import ScheduleSpec

DIVISORS = (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500)
OTHER_STEP_COUNTS = (3, 7, 9, 27, 30, 36, 37, *range(101, 112), 251, 333, 501, 750, 999, 1000)
BETAS = {"celebahq": (0.0015, 0.0195), "churches": (0.0015, 0.0155), "1p4B": (0.00085, 0.012)}


def network(x, t):
    """In place of a UNet: any smooth function of both."""
    return np.tanh(x) + 0.3 * np.sin(3 * x + t / 100)


def reference_alpha_bar(start, end):
    return np.cumprod(1 - np.linspace(start**0.5, end**0.5, 1000) ** 2)


def reference_tables(betas, steps):
    """Ascending timesteps, alpha_bar at each, and alpha_bar at the one before."""
    alpha_bar, t = reference_alpha_bar(*betas), np.arange(0, 1000, 1000 // steps) + 1
    return t, alpha_bar[t], np.append(alpha_bar[0], alpha_bar[t[:-1]])


def reference_update(x, eps, index, ab, ab_before, eta=0.0, noise=0.0):
    """The reference's update at the index-th timestep of its tables."""
    here, there = ab[index], ab_before[index]
    sigma = eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
    x_0 = (x - np.sqrt(1 - here) * eps) / np.sqrt(here)
    return np.sqrt(there) * x_0 + np.sqrt(1 - there - sigma**2) * eps + sigma * noise


def reference_ddim(x, steps, betas, eta=0.0, noises=None):
    """The timesteps of every network call, and x after each step."""
    t, ab, ab_before = reference_tables(betas, steps)
    called, passed = [], []
    for done, index in enumerate(reversed(range(len(t)))):
        called.append(t[index])
        noise = noises[done] if eta else 0.0
        x = reference_update(x, network(x, t[index]), index, ab, ab_before, eta, noise)
        passed.append(x)
    return called, passed


def reference_plms(x, steps, betas):
    """The timesteps of every network call, and x after each step."""
    t, ab, ab_before = reference_tables(betas, steps)
    called, passed, old = [], [], []

    def call(x, index):
        called.append(t[index])
        return network(x, t[index])

    for index in reversed(range(len(t))):
        e = call(x, index)
        if not old:  # Heun's method: a second call where plain DDIM leads
            mixed = (e + call(reference_update(x, e, index, ab, ab_before), max(index - 1, 0))) / 2
        elif len(old) == 1:
            mixed = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            mixed = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mixed = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        old = [*old, e][-3:]
        x = reference_update(x, mixed, index, ab, ab_before)
        passed.append(x)
    return called, passed


def our_run(x, sampler, steps, betas, eta=0.0, noises=None):
    """The same by our plan and step, which work in float32."""
    table = plan(Schedule(ScheduleSpec(*betas)), sampler, steps, eta)
    state = torch.zeros(1, 1 + table.history, *x.shape)
    state[0, 0] = torch.from_numpy(x)
    called, passed = [], []
    for done, line in enumerate(torch.from_numpy(table.coeffs)):
        t = line[0].item()
        eps = torch.from_numpy(network(state[0, 0].double().numpy(), t))[None]
        noise = torch.from_numpy(noises[done])[None] if eta else None
        state = step(state, eps, line[None], noise)
        called.append(t)
        passed.append(state[0, 0].double().numpy())
    return called, passed


def assert_same_path(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((4, 8, 8))


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_ddim(x, betas):
    for steps in DIVISORS:
        called, passed = our_run(x, "ddim", steps, betas)
        reference_called, reference_passed = reference_ddim(x, steps, betas)
        assert called == reference_called
        assert_same_path(passed, reference_passed)


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_plms(x, betas):
    for steps in DIVISORS:
        called, passed = our_run(x, "plms", steps, betas)
        reference_called, reference_passed = reference_plms(x, steps, betas)
        assert len(called) == steps + 1
        assert called == reference_called
        assert_same_path(passed[1:], reference_passed)  # the first is between the two calls of Heun's method


@pytest.mark.parametrize("steps", [5, 50, 200])
def test_ddim_with_noise(x, steps):
    noises = np.random.default_rng(1).standard_normal((steps, *x.shape))
    _, passed = our_run(x, "ddim", steps, BETAS["celebahq"], 1.0, noises)
    _, reference_passed = reference_ddim(x, steps, BETAS["celebahq"], 1.0, noises)
    assert_same_path(passed, reference_passed)


def test_published_timesteps():
    schedule = Schedule(ScheduleSpec(0.0015, 0.0195))
    assert plan(schedule, "ddim", 50).timesteps.tolist() == list(range(981, 0, -20))
    assert plan(schedule, "plms", 20).timesteps[:5].tolist() == [951, 901, 901, 851, 801]


def test_ddim_takes_any_step_count_and_ends_where_the_reference_does():
    schedule, end = Schedule(ScheduleSpec(0.0015, 0.0195)), reference_alpha_bar(0.0015, 0.0195)[0]
    for steps in range(1, 1001):
        table = plan(schedule, "ddim", steps)
        t = table.timesteps
        assert len(t) == steps
        assert t[0] <= 999
        assert t[-1] in (0, 1)
        # The last step keeps sqrt(alpha_bar_end / alpha_bar_t) of x.
        last = table.coeffs[-1]
        np.testing.assert_allclose(last[COMBO_START] * last[ALPHA], end**0.5, rtol=1e-12)


def test_every_sampler_takes_the_step_counts_that_the_reference_does_not():
    schedule = Schedule(ScheduleSpec(0.0015, 0.0195))
    for sampler in SAMPLERS:
        for steps in OTHER_STEP_COUNTS:
            if steps <= max_steps(sampler, 1000):
                assert len(plan(schedule, sampler, steps)) == unet_calls(sampler, steps) + (
                    sampler == "plms"
                ), (sampler, steps)

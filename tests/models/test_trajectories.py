"""Whole runs as the latent diffusion paper's code makes them, written again here in float64.

It visits range(0, 1000, 1000 // S) + 1, which is S timesteps of the table where S divides 1000 and is less.
"""

import numpy as np
import pytest
import torch

from models.sampling.samplers import SAMPLERS, max_steps, plan
from models.sampling.schedule import Schedule
from models.sampling.step import step
from models.spec import ScheduleSpec
from tests.helpers.reference_schedule import their_alpha_bar, their_timesteps

SOUND = (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500)
BETAS = {"celebahq": (0.0015, 0.0195), "churches": (0.0015, 0.0155), "1p4B": (0.00085, 0.012)}
STEPS_GONE_WRONG = (3, 7, 9, 27, 30, 36, 37, *range(101, 112), *range(251, 334), 501, 750, 999, 1000)


def eps_of(x, t):
    """Stands for a network: any smooth function of both will do."""
    return np.tanh(x) + 0.3 * np.sin(3 * x + t / 100)


def move(x, eps, index, ab, ab_before, eta=0.0, noise=0.0):
    """One update at the index-th timestep of their table, which ends at alpha_bar[0]."""
    here, there = ab[index], ab_before[index]
    sigma = eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
    x_0 = (x - np.sqrt(1 - here) * eps) / np.sqrt(here)
    return np.sqrt(there) * x_0 + np.sqrt(1 - there - sigma**2) * eps + sigma * noise


def tables(betas, count):
    alpha_bar, t = their_alpha_bar(*betas), their_timesteps(count)
    return t, alpha_bar[t], np.append(alpha_bar[0], alpha_bar[t[:-1]])


def their_ddim(x, count, betas, eta=0.0, noises=None):
    """The timesteps at which the network was asked, and x after each step."""
    t, ab, ab_before = tables(betas, count)
    asked, passed = [], []
    for done, index in enumerate(reversed(range(len(t)))):
        asked.append(t[index])
        noise = noises[done] if eta else 0.0
        x = move(x, eps_of(x, t[index]), index, ab, ab_before, eta, noise)
        passed.append(x)
    return asked, passed


def their_plms(x, count, betas):
    t, ab, ab_before = tables(betas, count)
    asked, passed, old = [], [], []

    def ask(x, index):
        asked.append(t[index])
        return eps_of(x, t[index])

    for index in reversed(range(len(t))):
        e = ask(x, index)
        if not old:  # Heun's: once more, where plain DDIM leads
            both = e + ask(move(x, e, index, ab, ab_before), max(index - 1, 0))
            mixed = both / 2
        elif len(old) == 1:
            mixed = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            mixed = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mixed = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        old = [*old, e][-3:]
        x = move(x, mixed, index, ab, ab_before)
        passed.append(x)
    return asked, passed


def ours(x, sampler, count, betas, eta=0.0, noises=None):
    """The same of our plan and our step, which work in float32."""
    table = plan(Schedule(ScheduleSpec(*betas)), sampler, count, eta)
    state = torch.zeros(1, 1 + table.history, *x.shape)
    state[0, 0] = torch.from_numpy(x)
    asked, passed = [], []
    for done, line in enumerate(torch.from_numpy(table.coeffs)):
        t = line[0].item()
        eps = torch.from_numpy(eps_of(state[0, 0].double().numpy(), t))[None]
        noise = torch.from_numpy(noises[done])[None] if eta else None
        state = step(state, eps, line[None], noise)
        asked.append(t)
        passed.append(state[0, 0].double().numpy())
    return asked, passed


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((4, 8, 8))


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
@pytest.mark.parametrize("count", SOUND)
def test_ddim(x, count, betas):
    asked, passed = ours(x, "ddim", count, betas)
    their_asked, their_passed = their_ddim(x, count, betas)
    assert asked == their_asked
    assert max(map(distance, passed, their_passed)) <= 1e-5


def test_ddim_of_fifty_steps_asks_where_it_was_published_to():
    table = plan(Schedule(ScheduleSpec(0.0015, 0.0195)), "ddim", 50)
    assert table.timesteps.tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize("count", [5, 50, 200])
def test_ddim_with_noise(x, count):
    noises = np.random.default_rng(1).standard_normal((count, *x.shape))
    _, passed = ours(x, "ddim", count, BETAS["celebahq"], 1.0, noises)
    _, their_passed = their_ddim(x, count, BETAS["celebahq"], 1.0, noises)
    assert max(map(distance, passed, their_passed)) <= 1e-5


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
@pytest.mark.parametrize("count", SOUND)
def test_plms(x, count, betas):
    asked, passed = ours(x, "plms", count, betas)
    their_asked, their_passed = their_plms(x, count, betas)
    assert len(asked) == count + 1
    assert asked == their_asked
    assert max(map(distance, passed[1:], their_passed)) <= 1e-5  # the first is where Heun's asks again


def test_plms_of_twenty_steps_asks_where_it_was_published_to():
    table = plan(Schedule(ScheduleSpec(0.0015, 0.0195)), "plms", 20)
    assert table.timesteps[:5].tolist() == [951, 901, 901, 851, 801]


@pytest.mark.parametrize("count", STEPS_GONE_WRONG)
def test_theirs_is_not_sound_where_the_steps_do_not_divide(count):
    t = their_timesteps(count)
    assert len(t) != count or t[-1] > 999


def test_ours_takes_as_many_steps_as_asked_within_the_table_and_ends_where_theirs_does():
    spec = ScheduleSpec(0.0015, 0.0195)
    schedule = Schedule(spec)
    end = their_alpha_bar(0.0015, 0.0195)[0]
    for count in range(1, 1001):
        table = plan(schedule, "ddim", count)
        t = table.timesteps
        assert len(t) == count
        assert (np.diff(t) < 0).all()
        assert t[0] <= 999
        assert t[-1] in (0, 1)
        # What is left of x in the last step is sqrt(alpha_bar_end / alpha_bar_t).
        x_factor, signal = table.coeffs[-1, 6], table.coeffs[-1, 1]
        np.testing.assert_allclose(x_factor * signal, end**0.5, rtol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_as_many_steps_as_asked(sampler):
    schedule = Schedule(ScheduleSpec(0.0015, 0.0195))
    for count in STEPS_GONE_WRONG:
        if count <= max_steps(sampler, 1000):
            assert len(plan(schedule, sampler, count)) == count + (sampler == "plms")

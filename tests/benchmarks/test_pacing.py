"""The engine on a simulated GPU: how many rows its calls have, and what padding costs."""

from __future__ import annotations

import pytest

from service.setting_values import DEFAULT_BUCKETS
from tests.benchmarks.pacing import COARSE_BUCKETS, MODELS, Costs, make_job, simulate, speedup

JOBS = [make_job(number, steps=50) for number in range(16)]


@pytest.mark.parametrize(
    "costs",
    [
        Costs(0.0045, 0.00199, 0.009, first=2.0, record=0.6),
        Costs(0.0045, 0.00199, 0.009, first=5.0, record=1.5),
        Costs(0.006, 0.0142, 0.050, first=6.0, record=3.0),
    ],
)
def test_slow_first_calls_do_not_make_later_calls_smaller(costs):
    calls = simulate(costs, DEFAULT_BUCKETS, JOBS, clients=16).calls
    assert calls == (2, *[32] * (len(calls) - 1))


def test_calls_that_really_are_slow_get_fewer_rows():
    calls = simulate(Costs(0.1, 0.1, 0.1), DEFAULT_BUCKETS, JOBS[:8], clients=8).calls
    assert max(calls[8:]) == 8


def test_finer_buckets_use_more_of_the_rows():
    """The bar of the mixed load at the size of Stable Diffusion 1.5, in simulated time."""
    costs = MODELS["Stable Diffusion 1.5, 512"]
    coarse, fine = speedup(costs, COARSE_BUCKETS), speedup(costs, DEFAULT_BUCKETS)
    assert fine[1] > 0.95 > coarse[1]
    assert fine[0] > max(1.95, coarse[0])

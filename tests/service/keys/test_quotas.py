"""Quotas: never more than the quota in any window, and the exact moment at which a request fits again."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import RateLimited, Unavailable
from service.keys.client import Client, KeyLimits
from service.keys.quotas import SLOTS, Caller, MemoryCounts, Quota, Quotas, headers_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def take(windows: MemoryCounts, quota: Quota, cost: int = 1, client: str = "key a"):
    return asyncio.run(windows.take(client, quota, cost))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 8),
    kind=st.sampled_from(["requests", "images"]),
    steps=st.lists(st.tuples(st.floats(0, 0.4), st.integers(1, 4)), min_size=1, max_size=60),
)
def test_no_window_contains_more_than_the_quota(count, kind, steps):
    clock, quota = Clock(), Quota(kind, count)
    windows, uses = MemoryCounts(clock), []
    for part, cost in steps:
        clock.now += part * quota.window
        if take(windows, quota, cost).allowed:
            uses.append((clock.now, cost))
        within = sum(cost for at, cost in uses if at > clock.now - quota.window)
        assert within <= count


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 6), seed=st.integers(0, 10**6), cost=st.integers(1, 6))
def test_a_refused_use_fits_after_the_seconds_of_its_refusal_and_not_a_slot_sooner(count, seed, cost):
    draw, clock, quota = random.Random(seed), Clock(), Quota("requests", count)
    windows, cost = MemoryCounts(clock), min(cost, count)
    while (verdict := take(windows, quota, cost)).allowed:
        clock.now += draw.uniform(0, 10)
    refused = clock.now
    clock.now = refused + verdict.seconds - 2 * quota.slot
    assert not take(windows, quota, cost).allowed
    clock.now = refused + verdict.seconds
    assert take(windows, quota, cost).allowed


def test_a_quota_is_free_again_at_most_a_slot_later_than_its_window():
    clock, quota = Clock(), Quota("images", 3)
    windows = MemoryCounts(clock)
    assert take(windows, quota, 3).left == 0
    clock.now += quota.window + quota.slot
    assert take(windows, quota, 3).allowed
    assert quota.slot * SLOTS == quota.window == 3600


def test_a_refused_use_costs_nothing():
    clock, quota = Clock(), Quota("images", 3)
    windows = MemoryCounts(clock)
    assert [take(windows, quota, cost).allowed for cost in (2, 2, 2, 1)] == [True, False, False, True]


def test_each_client_and_each_kind_has_its_own_quota():
    windows, quota = MemoryCounts(Clock()), Quota("requests", 1)
    assert take(windows, quota).allowed
    assert not take(windows, quota).allowed
    assert take(windows, quota, client="key b").allowed
    assert take(windows, Quota("images", 1)).allowed


def caller(**limits: int) -> Caller:
    return Caller(Client("key a", "a", limits=KeyLimits(**limits)), "request")


def test_a_client_without_limits_is_never_refused_and_gets_no_fields():
    one, quotas = caller(), Quotas()
    for _ in range(100):
        asyncio.run(quotas.take_request(one))
        asyncio.run(quotas.take_images(one, 1000))
    assert headers_of(one.verdicts.values()) == []


def test_the_fields_of_the_draft():
    one, quotas = caller(requests_per_minute=5, images_per_hour=10), Quotas(own=MemoryCounts(Clock()))
    asyncio.run(quotas.take_request(one))
    asyncio.run(quotas.take_images(one, 4))
    assert headers_of(one.verdicts.values()) == [
        (b"ratelimit-policy", b'"requests";q=5;w=60, "images";q=10;qu="images";w=3600'),
        (b"ratelimit", b'"requests";r=4;t=61, "images";r=6;t=3620'),
    ]


def test_a_refusal_says_what_is_used_up_and_until_when():
    one, quotas = caller(images_per_hour=10), Quotas(own=MemoryCounts(Clock()))
    asyncio.run(quotas.take_images(one, 8))
    with pytest.raises(RateLimited, match="10 images an hour") as error:
        asyncio.run(quotas.take_images(one, 3))
    assert error.value.retry_after == one.verdicts["images"].seconds == 3620
    assert one.verdicts["images"].left == 2


class Down:
    async def take(self, client, quota, cost):
        raise Unavailable


def test_while_the_shared_count_fails_this_server_counts_alone():
    one, quotas = caller(requests_per_minute=1), Quotas(Down())
    asyncio.run(quotas.take_request(one))
    with pytest.raises(RateLimited):
        asyncio.run(quotas.take_request(one))

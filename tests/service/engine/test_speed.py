"""Running averages of the time that UNet calls take."""

from __future__ import annotations

import pytest

from service.engine.job import Segment
from service.engine.runner import Call
from service.engine.speed import EMA_ALPHA, CallSize, Speed

SIZE = CallSize(Segment("g", rows=1, evaluations=3, row_cost=2.0), rows=3, padded_rows=4)


def test_nothing_is_known_before_the_first_call():
    speed = Speed()
    assert speed.seconds(10.0) is None
    assert speed.row_seconds("g") == 0.0


def test_seconds_are_per_unit_of_work():
    speed = Speed()
    speed.record(SIZE, Call(4), 0.6)
    assert speed.seconds(10.0) == pytest.approx(1.0)
    speed.record(SIZE, Call(4), 1.2)
    assert speed.seconds(10.0) == pytest.approx(1.0 + EMA_ALPHA)


def test_the_first_call_of_a_group_does_not_count_for_its_rows():
    speed = Speed()
    speed.record(SIZE, Call(4), 60.0)
    assert speed.row_seconds("g") == 0.0
    speed.record(SIZE, Call(4), 0.4)
    assert speed.row_seconds("g") == pytest.approx(0.1)
    speed.record(SIZE, Call(4), 0.8)
    assert speed.row_seconds("g") == pytest.approx(0.1 + EMA_ALPHA * 0.1)


def test_an_unfinished_call_counts_with_the_next_one():
    speed = Speed()
    speed.record(SIZE, Call(4, unfinished=True), 0.001)
    assert speed.seconds(10.0) is None
    speed.record(SIZE, Call(4, unfinished=True, seconds=0.6), 0.001)
    assert speed.seconds(10.0) == pytest.approx(1.0)

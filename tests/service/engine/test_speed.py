"""Running averages of the time that UNet calls take."""

from __future__ import annotations

import pytest

from service.engine.runner import Call
from service.engine.speed import EMA_ALPHA, CallSize, Speed

SIZE = CallSize("g", rows=3, padded_rows=4, work=6.0)


def test_nothing_is_known_before_the_first_call():
    speed = Speed()
    assert speed.seconds(10.0) is None
    assert speed.call_seconds("g", 4) == 0.0


def test_seconds_are_per_unit_of_work():
    speed = Speed()
    speed.record(SIZE, Call(4), 0.6)
    assert speed.seconds(10.0) == pytest.approx(1.0)
    speed.record(SIZE, Call(4), 1.2)
    assert speed.seconds(10.0) == pytest.approx(1.0 + EMA_ALPHA)


def test_the_first_call_of_a_group_does_not_count_for_its_calls():
    speed = Speed()
    speed.record(SIZE, Call(4), 60.0)
    assert speed.call_seconds("g", 4) == 0.0
    speed.record(SIZE, Call(4), 0.4)
    assert speed.call_seconds("g", 4) == pytest.approx(0.4)
    speed.record(SIZE, Call(4), 0.8)
    assert speed.call_seconds("g", 4) == pytest.approx(0.4 + EMA_ALPHA * 0.4)


def test_an_unfinished_call_counts_with_the_next_one():
    speed = Speed()
    speed.record(SIZE, Call(4, unfinished=True), 0.001)
    assert speed.seconds(10.0) is None
    speed.record(SIZE, Call(4, unfinished=True, seconds=0.6), 0.001)
    assert speed.seconds(10.0) == pytest.approx(1.0)


def test_calls_of_other_sizes_are_estimated_from_the_nearest_smaller_one():
    speed = Speed()
    for rows, seconds in ((4, 9.0), (4, 1.0), (16, 2.0)):
        speed.record(SIZE._replace(padded_rows=rows), Call(rows), seconds)
    estimates = {rows: speed.call_seconds("g", rows) for rows in (2, 4, 8, 16, 32)}
    assert estimates == {2: 0.5, 4: 1.0, 8: 2.0, 16: 2.0, 32: 4.0}


def test_slow_calls_do_not_count():
    speed = Speed()
    for seconds, slow in ((0.4, False), (0.4, False), (60.0, True), (0.4, False)):
        speed.record(SIZE, Call(4, slow=slow), seconds)
    assert speed.call_seconds("g", 4) == pytest.approx(0.4)
    assert speed.seconds(6.0) == pytest.approx(0.4)


def test_a_slow_call_that_is_reported_with_the_next_one_does_not_count():
    speed = Speed()
    speed.record(SIZE, Call(4, unfinished=True, slow=True), 0.001)
    speed.record(SIZE, Call(4, unfinished=True, seconds=60.0), 0.001)
    assert speed.seconds(6.0) is None
    speed.record(SIZE, Call(4, unfinished=True, seconds=0.6, slow=True), 0.001)
    assert speed.seconds(6.0) == pytest.approx(0.6)

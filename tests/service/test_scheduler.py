"""Which rows share a UNet call."""

from __future__ import annotations

import pytest

from service.job import ImageKey, Shape
from service.scheduler import Scheduler


def shape(group: str = "g", evaluations: int = 3, row_cost: float = 1.0) -> Shape:
    return Shape(group, evaluations, row_cost)


def test_jobs_of_one_group_share_a_call():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape(), images=1, rows=2)
    scheduler.admit("b", shape(evaluations=40), images=2, rows=1)
    assert scheduler.pick() == [ImageKey("a", 0), ImageKey("b", 0), ImageKey("b", 1)]


def test_a_call_never_has_more_rows_than_allowed_and_smaller_images_fill_the_gap():
    scheduler = Scheduler(3)
    scheduler.admit("a", shape(), images=2, rows=2)
    scheduler.admit("b", shape(), images=1, rows=1)
    assert scheduler.pick() == [ImageKey("a", 0), ImageKey("b", 0)]


def test_a_job_joins_and_leaves_between_steps():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape(evaluations=2), images=1, rows=2)
    assert scheduler.advance(scheduler.pick()) == []
    scheduler.admit("b", shape(evaluations=2), images=1, rows=2)
    assert scheduler.advance(scheduler.pick()) == [ImageKey("a", 0)]
    assert scheduler.pick() == [ImageKey("b", 0)]


def test_a_removed_job_frees_its_rows_at_once():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape(), images=1, rows=2)
    scheduler.admit("b", shape(), images=1, rows=2)
    scheduler.remove("a")
    scheduler.remove("never there")
    assert scheduler.pick() == [ImageKey("b", 0)]


def test_a_higher_priority_overtakes_at_the_next_step():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape(), images=1, rows=2)
    scheduler.advance(scheduler.pick())
    scheduler.admit("b", shape(), images=1, rows=2, priority=1)
    assert scheduler.pick() == [ImageKey("b", 0)]


def test_groups_take_turns_by_work_done():
    scheduler = Scheduler(8)
    scheduler.admit("cheap", shape("x", 100, row_cost=1), images=1, rows=1)
    scheduler.admit("dear", shape("y", 100, row_cost=4), images=1, rows=1)
    turns = []
    for _ in range(50):
        picked = scheduler.pick()
        turns.append(picked[0].job)
        scheduler.advance(picked)
    assert turns.count("cheap") == 4 * turns.count("dear")


def test_a_group_that_comes_later_does_not_get_the_past_back():
    scheduler = Scheduler(8)
    scheduler.admit("old", shape("x", 100), images=1, rows=1)
    for _ in range(50):
        scheduler.advance(scheduler.pick())
    scheduler.admit("new", shape("y", 100), images=1, rows=1)
    turns = []
    for _ in range(10):
        picked = scheduler.pick()
        turns.append(picked[0].job)
        scheduler.advance(picked)
    assert turns.count("old") == turns.count("new")


def test_a_queued_job_cannot_be_queued_again():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape(), images=1, rows=1)
    with pytest.raises(ValueError, match="queued already"):
        scheduler.admit("a", shape(), images=1, rows=1)

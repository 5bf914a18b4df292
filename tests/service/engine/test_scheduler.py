"""Which rows share a UNet call."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sized
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.job import ImageKey, Shape
from service.engine.scheduler import PATIENCE, Position, Scheduler


def shape(group: str = "g", evaluations: int = 3, row_cost: float = 1.0) -> Shape:
    return Shape(group, evaluations, row_cost)


def tick(scheduler: Scheduler) -> list[ImageKey]:
    """One call; returns what was in it."""
    picked = scheduler.pick()
    scheduler.advance(picked)
    return picked


def last_calls(scheduler: Scheduler) -> dict[str, int]:
    """Run everything; returns the number of each job's last call."""
    last: dict[str, int] = {}
    for call in count(1):
        picked = tick(scheduler)
        if not picked:
            return last
        last |= dict.fromkeys([key.job for key in picked], call)
    raise AssertionError


def turns(scheduler: Scheduler, calls: int) -> Counter[str]:
    """Calls that each job had a part in."""
    return Counter(job for _ in range(calls) for job in {key.job for key in tick(scheduler)})


def test_jobs_of_one_group_share_a_call():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape(), images=1, rows=2)
    scheduler.admit("b", shape(evaluations=40), images=2, rows=1)
    assert scheduler.pick() == [ImageKey("a", 0), ImageKey("b", 0), ImageKey("b", 1)]


def test_jobs_of_different_groups_share_no_call():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape("x"), images=1, rows=2)
    scheduler.admit("b", shape("y"), images=1, rows=2)
    assert turns(scheduler, 1) + turns(scheduler, 1) == {"a": 1, "b": 1}


def test_smaller_images_fill_a_call_that_is_limited():
    scheduler = Scheduler(3)
    scheduler.admit("a", shape(), images=2, rows=2)
    scheduler.admit("b", shape(evaluations=40), images=1, rows=1)
    assert scheduler.pick() == [ImageKey("a", 0), ImageKey("b", 0)]


def test_if_all_images_fit_all_run():
    scheduler = Scheduler(24)
    scheduler.admit("large", shape(evaluations=1000), images=8, rows=2)
    scheduler.admit("small", shape(), images=4, rows=1, priority=9)
    scheduler.admit("other", shape(), images=2, rows=2)
    assert len(scheduler.pick()) == 14


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


def test_the_work_of_a_cancelled_job_is_not_charged_to_others():
    scheduler = Scheduler(2)
    scheduler.admit("cancelled", shape(evaluations=10), images=1, rows=2)
    scheduler.admit("old", shape(evaluations=10), images=1, rows=2)
    turns(scheduler, 9)
    scheduler.remove("cancelled")
    turns(scheduler, 3)  # shared evenly, old would have had 6 by now and 4 to go
    scheduler.admit("new", shape(evaluations=3), images=1, rows=2)
    assert scheduler.pick() == [ImageKey("new", 0)]


def test_a_small_job_overtakes_a_large_one():
    scheduler = Scheduler(4)
    scheduler.admit("large", shape(evaluations=1000), images=16, rows=2)
    tick(scheduler)
    scheduler.admit("small", shape(evaluations=10), images=1, rows=2)
    assert turns(scheduler, 10)["small"] == 10


def test_equal_jobs_finish_one_after_the_other():
    scheduler = Scheduler(2)
    for name in "abc":
        scheduler.admit(name, shape(evaluations=4), images=1, rows=2)
    assert last_calls(scheduler) == {"a": 4, "b": 8, "c": 12}


def test_images_of_a_job_that_does_not_fit_take_turns():
    scheduler = Scheduler(4)
    scheduler.admit("a", shape(evaluations=4), images=3, rows=2)
    assert last_calls(scheduler) == {"a": 6}


def test_a_higher_priority_overtakes_at_the_next_step():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape(), images=1, rows=2)
    tick(scheduler)
    scheduler.admit("b", shape(), images=1, rows=2, priority=1)
    assert scheduler.pick() == [ImageKey("b", 0)]


def test_a_high_priority_does_not_pay_for_the_work_of_low_ones():
    scheduler = Scheduler(2)
    scheduler.admit("other", shape("x", 1000), images=1, rows=1, priority=9)
    scheduler.admit("low", shape("y", 1000), images=1, rows=1)
    turns(scheduler, 3)
    scheduler.admit("high", shape("y", 10), images=1, rows=1, priority=9)
    assert turns(scheduler, 30)["high"] >= 8


def test_groups_take_turns_by_work_done():
    scheduler = Scheduler(8)
    scheduler.admit("cheap", shape("x", 100, row_cost=1), images=1, rows=1)
    scheduler.admit("dear", shape("y", 100, row_cost=4), images=1, rows=1)
    assert turns(scheduler, 50) == {"cheap": 40, "dear": 10}


def test_a_group_gets_a_share_for_each_of_its_jobs():
    scheduler = Scheduler(8)
    for name in "abc":
        scheduler.admit(name, shape("x", 100), images=1, rows=1)
    scheduler.admit("lone", shape("y", 100), images=1, rows=1)
    assert turns(scheduler, 40) == {"a": 20, "b": 20, "c": 20, "lone": 20}


def test_a_later_group_does_not_catch_up_on_earlier_work():
    scheduler = Scheduler(8)
    scheduler.admit("old", shape("x", 100), images=1, rows=1)
    turns(scheduler, 50)
    scheduler.admit("new", shape("y", 100), images=1, rows=1)
    assert turns(scheduler, 10) == {"old": 5, "new": 5}


@pytest.mark.parametrize("flood", [shape("x", 1), shape("y", 1), shape("y", 1, row_cost=9)], ids=str)
def test_many_jobs_of_high_priority_do_not_starve_one_of_low_priority(flood):
    scheduler = Scheduler(4)
    scheduler.admit("low", shape("x", 5), images=1, rows=2)
    bound = (PATIENCE + 2) * 5 * 4 * flood.row_cost
    work, steps = 0.0, 0
    for call in count():
        scheduler.admit(f"{call} a", flood, images=1, rows=2, priority=9)
        scheduler.admit(f"{call} b", flood, images=1, rows=2, priority=9)
        picked = tick(scheduler)
        steps += ImageKey("low", 0) in picked
        work += sum(2 * (1 if key.job == "low" else flood.row_cost) for key in picked)
        if steps == 5:
            break
    assert 5 * 4 < work <= bound


def test_a_limit_applies_to_the_next_call_of_its_group():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape("x"), images=8, rows=1)
    scheduler.limit("y", 2)
    assert len(scheduler.pick()) == 8
    scheduler.limit("x", 3)
    assert len(scheduler.pick()) == 3
    scheduler.limit("x", 50)
    assert len(scheduler.pick()) == 8


def test_a_limit_can_be_lifted():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape(), images=8, rows=1)
    scheduler.limit("g", 3)
    scheduler.limit("g", None)
    assert len(scheduler.pick()) == 8


def test_an_image_of_more_rows_than_its_limit_runs_alone():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape(), images=2, rows=2)
    scheduler.admit("b", shape(evaluations=50), images=2, rows=1)
    scheduler.limit("g", 1)
    assert scheduler.pick() == [ImageKey("a", 0)]


@pytest.mark.parametrize("rows", [0, -1])
def test_a_limit_of_no_rows_is_refused(rows):
    with pytest.raises(ValueError, match="at least 1"):
        Scheduler(8).limit("g", rows)


def test_a_waiting_job_has_a_position_and_work_ahead():
    scheduler = Scheduler(2)
    scheduler.admit("running", shape(evaluations=2), images=1, rows=2)
    tick(scheduler)
    scheduler.admit("large", shape(evaluations=10), images=2, rows=1)
    scheduler.admit("small", shape(evaluations=3), images=1, rows=1)
    assert scheduler.queue() == [Position("small", 1, 2.0, 3.0), Position("large", 2, 5.0, 20.0)]
    assert scheduler.position("large") == Position("large", 2, 5.0, 20.0)


def test_a_job_that_has_started_has_no_position():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape(), images=2, rows=2)
    tick(scheduler)
    assert scheduler.position("a") is None
    assert scheduler.position("never there") is None


def test_running_and_waiting_jobs_are_counted():
    scheduler = Scheduler(4)
    for name in "abc":
        scheduler.admit(name, shape(), images=1, rows=2)
    tick(scheduler)
    assert (scheduler.running, scheduler.waiting, len(scheduler)) == (2, 1, 3)
    scheduler.remove("a")
    assert (scheduler.running, scheduler.waiting, len(scheduler)) == (1, 1, 2)


def test_a_queued_job_cannot_be_queued_again():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape(), images=1, rows=1)
    with pytest.raises(ValueError, match="queued already"):
        scheduler.admit("a", shape(), images=1, rows=1)


@pytest.mark.parametrize(("images", "rows"), [(0, 1), (1, 0)])
def test_a_job_without_rows_is_refused(images, rows):
    with pytest.raises(ValueError, match="needs at least 1 image"):
        Scheduler(2).admit("a", shape(), images, rows)


def fair_ends(arrivals: list[tuple[int, int, float]]) -> list[float]:
    """When processor sharing by weight finishes jobs of (arrival, work, weight)."""
    left = {index: float(work) for index, (_, work, _) in enumerate(arrivals)}
    ends, now = [0.0] * len(arrivals), 0.0
    while left:
        present = {index: arrivals[index][2] for index in left if arrivals[index][0] <= now}
        coming = min((arrivals[index][0] for index in left if arrivals[index][0] > now), default=math.inf)
        total = sum(present.values())
        span = min([coming - now] + [left[index] * total / weight for index, weight in present.items()])
        now += span
        for index, weight in present.items():
            left[index] -= span * weight / total
            if left[index] < 1e-9:
                ends[index] = now
                del left[index]
    return ends


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=12))
@settings(max_examples=500, deadline=None)
def test_with_one_image_a_call_no_job_finishes_later_than_under_processor_sharing(drawn):
    scheduler = Scheduler(2, patience=math.inf)
    arrivals, ends, now = [], {}, 0

    def run(calls: float) -> None:
        nonlocal now
        while calls > 0 and len(scheduler):
            calls, now = calls - 1, now + 1
            ends.update((key.job, now) for key in tick(scheduler))

    for gap, evaluations, priority in drawn:
        run(gap)
        scheduler.admit(str(len(arrivals)), shape("g", evaluations, row_cost=0.5), 1, 2, priority)
        arrivals.append((now, evaluations, 4.0**priority))
    run(math.inf)
    assert all(ends[str(index)] <= fair + 1e-6 for index, fair in enumerate(fair_ends(arrivals)))


COSTS = {"x": 1.0, "y": 3.0, "z": 0.25}


class History:
    """A scheduler, and a model of what must be true of it."""

    def __init__(self, max_rows: int) -> None:
        self.scheduler = Scheduler(max_rows)
        self.max_rows = max_rows
        self.limits: dict[str, int | None] = {}
        self.jobs: dict[str, tuple[str, int]] = {}  # group, rows
        self.left: Counter[ImageKey] = Counter()
        self.work = 0.0
        self.bounds: dict[str, float] = {}
        self.names = count()

    def admit(self, group: str, evaluations: int, images: int, rows: int, priority: int) -> None:
        name = str(next(self.names))
        self.scheduler.admit(name, Shape(group, evaluations, COSTS[group]), images, rows, priority)
        self.jobs[name] = group, rows
        self.left.update({ImageKey(name, index): evaluations for index in range(images)})
        full_call = self.max_rows * max(COSTS.values())
        self.bounds[name] = self.work + (PATIENCE + 2) * self.left.total() * full_call

    def remove(self, number: int) -> None:
        self.scheduler.remove(str(number))
        for key in [key for key in self.left if key.job == str(number)]:
            self.drop(key)

    def limit(self, group: str, rows: int | None) -> None:
        self.scheduler.limit(group, rows)
        self.limits[group] = rows

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.call()

    def flood(self, group: str, calls: int, images: int) -> None:
        for _ in range(calls):
            self.admit(group, 1, images, 2, 9)
            self.call()

    def call(self) -> None:
        picked = self.scheduler.pick()
        self.check(picked)
        self.work += sum(self.jobs[key.job][1] * COSTS[self.jobs[key.job][0]] for key in picked)
        self.left.subtract(picked)
        finished = [key for key in picked if not self.left[key]]
        assert sorted(self.scheduler.advance(picked)) == sorted(finished)
        for key in finished:
            assert self.work <= self.bounds[key.job]
            self.drop(key)

    def check(self, picked: list[ImageKey]) -> None:
        """Check that images are unfinished, of one group, unique, within its limit, and as many as fit."""
        assert bool(picked) == bool(self.left)
        assert all(self.left[key] > 0 for key in picked)
        assert len(set(picked)) == len(picked)
        assert len({self.jobs[key.job][0] for key in picked}) <= 1
        if picked:
            group = self.jobs[picked[0].job][0]
            limit = min(self.limits.get(group) or self.max_rows, self.max_rows)
            rows = sum(self.jobs[key.job][1] for key in picked)
            assert rows <= limit or len(picked) == 1
            waiting = [key for key in self.left if self.jobs[key.job][0] == group and key not in picked]
            assert not waiting or rows + max(self.jobs[key.job][1] for key in waiting) > limit

    def drop(self, key: ImageKey) -> None:
        del self.left[key]
        if not any(key.job == other.job for other in self.left):
            del self.jobs[key.job]

    def check_queue(self) -> None:
        places = self.scheduler.queue()
        assert [place.position for place in places] == list(range(1, self.scheduler.waiting + 1))
        assert self.scheduler.running + self.scheduler.waiting == len(self.scheduler) == len(self.jobs)
        assert all(place.ahead >= 0 and place.job in self.jobs for place in places)


groups = st.sampled_from(list(COSTS))
moves = st.one_of(
    st.tuples(st.just(History.admit), groups, *(st.integers(*r) for r in [(1, 12), (1, 4), (1, 2), (-2, 9)])),
    st.tuples(st.just(History.remove), st.integers(0, 20)),
    st.tuples(st.just(History.limit), groups, st.one_of(st.none(), st.integers(1, 9))),
    st.tuples(st.just(History.run), st.integers(1, 20)),
    st.tuples(st.just(History.flood), groups, st.integers(1, 60), st.integers(1, 2)),
)


@pytest.mark.slow
@given(moves=st.lists(moves, max_size=25), max_rows=st.integers(2, 9))
@settings(max_examples=2000, deadline=None)
def test_every_image_gets_its_steps_within_the_bound_and_nothing_is_left_over(moves, max_rows):
    history = History(max_rows)
    for move, *arguments in moves:
        move(history, *arguments)
        history.check_queue()
    while history.left:
        history.call()
    for group in COSTS:
        history.scheduler.limit(group, None)
    assert history.scheduler.pick() == []
    assert not any(value for value in vars(history.scheduler).values() if isinstance(value, Sized))

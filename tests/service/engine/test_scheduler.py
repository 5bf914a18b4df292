"""Which rows share a UNet call."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sized
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.job import ImageKey, Segment, Shape
from service.engine.scheduler import PATIENCE, Position, Scheduler


def shape(group: str = "g", evaluations: int = 3, row_cost: float = 1.0, rows: int = 1) -> Shape:
    return Shape((Segment(group, rows, evaluations, row_cost),))


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
    scheduler.admit("a", shape(rows=2), images=1)
    scheduler.admit("b", shape(evaluations=40), images=2)
    assert scheduler.pick() == [ImageKey("a", 0), ImageKey("b", 0), ImageKey("b", 1)]


def test_jobs_of_different_groups_share_no_call():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape("x", rows=2), images=1)
    scheduler.admit("b", shape("y", rows=2), images=1)
    assert turns(scheduler, 1) + turns(scheduler, 1) == {"a": 1, "b": 1}


def test_smaller_images_fill_a_call_that_is_limited():
    scheduler = Scheduler(3)
    scheduler.admit("a", shape(rows=2), images=2)
    scheduler.admit("b", shape(evaluations=40), images=1)
    assert scheduler.pick() == [ImageKey("a", 0), ImageKey("b", 0)]


def test_if_all_images_fit_all_run():
    scheduler = Scheduler(24)
    scheduler.admit("large", shape(evaluations=1000, rows=2), images=8)
    scheduler.admit("small", shape(), images=4, priority=9)
    scheduler.admit("other", shape(rows=2), images=2)
    assert len(scheduler.pick()) == 14


def test_a_job_joins_and_leaves_between_steps():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape(evaluations=2, rows=2), images=1)
    assert scheduler.advance(scheduler.pick()) == []
    scheduler.admit("b", shape(evaluations=2, rows=2), images=1)
    assert scheduler.advance(scheduler.pick()) == [ImageKey("a", 0)]
    assert scheduler.pick() == [ImageKey("b", 0)]


def test_a_removed_job_frees_its_rows_at_once():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape(rows=2), images=1)
    scheduler.admit("b", shape(rows=2), images=1)
    scheduler.remove("a")
    scheduler.remove("never there")
    assert scheduler.pick() == [ImageKey("b", 0)]


def test_the_work_of_a_cancelled_job_is_not_charged_to_others():
    scheduler = Scheduler(2)
    scheduler.admit("cancelled", shape(evaluations=10, rows=2), images=1)
    scheduler.admit("old", shape(evaluations=10, rows=2), images=1)
    turns(scheduler, 9)
    scheduler.remove("cancelled")
    turns(scheduler, 3)  # shared evenly, old would have had 6 by now and 4 to go
    scheduler.admit("new", shape(evaluations=3, rows=2), images=1)
    assert scheduler.pick() == [ImageKey("new", 0)]


def test_a_small_job_overtakes_a_large_one():
    scheduler = Scheduler(4)
    scheduler.admit("large", shape(evaluations=1000, rows=2), images=16)
    tick(scheduler)
    scheduler.admit("small", shape(evaluations=10, rows=2), images=1)
    assert turns(scheduler, 10)["small"] == 10


def test_equal_jobs_finish_one_after_the_other():
    scheduler = Scheduler(2)
    for name in "abc":
        scheduler.admit(name, shape(evaluations=4, rows=2), images=1)
    assert last_calls(scheduler) == {"a": 4, "b": 8, "c": 12}


def test_images_of_a_job_that_does_not_fit_take_turns():
    scheduler = Scheduler(4)
    scheduler.admit("a", shape(evaluations=4, rows=2), images=3)
    assert last_calls(scheduler) == {"a": 6}


def test_a_higher_priority_overtakes_at_the_next_step():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape(rows=2), images=1)
    tick(scheduler)
    scheduler.admit("b", shape(rows=2), images=1, priority=1)
    assert scheduler.pick() == [ImageKey("b", 0)]


def test_a_high_priority_does_not_pay_for_the_work_of_low_ones():
    scheduler = Scheduler(2)
    scheduler.admit("other", shape("x", 1000), images=1, priority=9)
    scheduler.admit("low", shape("y", 1000), images=1)
    turns(scheduler, 3)
    scheduler.admit("high", shape("y", 10), images=1, priority=9)
    assert turns(scheduler, 30)["high"] >= 8


def test_groups_take_turns_by_work_done():
    scheduler = Scheduler(8)
    scheduler.admit("cheap", shape("x", 100, row_cost=1), images=1)
    scheduler.admit("dear", shape("y", 100, row_cost=4), images=1)
    assert turns(scheduler, 50) == {"cheap": 40, "dear": 10}


def test_a_group_gets_a_share_for_each_of_its_jobs():
    scheduler = Scheduler(8)
    for name in "abc":
        scheduler.admit(name, shape("x", 100), images=1)
    scheduler.admit("lone", shape("y", 100), images=1)
    assert turns(scheduler, 40) == {"a": 20, "b": 20, "c": 20, "lone": 20}


def test_a_later_group_does_not_catch_up_on_earlier_work():
    scheduler = Scheduler(8)
    scheduler.admit("old", shape("x", 100), images=1)
    turns(scheduler, 50)
    scheduler.admit("new", shape("y", 100), images=1)
    assert turns(scheduler, 10) == {"old": 5, "new": 5}


@pytest.mark.parametrize("flood", [("x", 1.0), ("y", 1.0), ("y", 9.0)])
def test_many_jobs_of_high_priority_do_not_starve_one_of_low_priority(flood):
    scheduler = Scheduler(4)
    scheduler.admit("low", shape("x", 5, rows=2), images=1)
    group, cost = flood
    bound = (PATIENCE + 2) * 5 * 4 * cost
    work, steps = 0.0, 0
    for call in count():
        scheduler.admit(f"{call} a", shape(group, 1, cost, rows=2), images=1, priority=9)
        scheduler.admit(f"{call} b", shape(group, 1, cost, rows=2), images=1, priority=9)
        picked = tick(scheduler)
        steps += ImageKey("low", 0) in picked
        work += sum(2 * (1 if key.job == "low" else cost) for key in picked)
        if steps == 5:
            break
    assert 5 * 4 < work <= bound


def flooded(jobs: int, group: str = "g") -> Scheduler:
    """A scheduler of 8 rows in which client A has had many jobs for a while."""
    scheduler = Scheduler(8)
    for index in range(jobs):
        scheduler.admit(f"a{index}", shape(group, evaluations=100, rows=2), images=4, client="A")
    for _ in range(20):
        tick(scheduler)
    return scheduler


@pytest.mark.parametrize("jobs", [1, 100])
@pytest.mark.parametrize("group", ["g", "another"])
def test_a_client_with_many_jobs_delays_another_one_no_more_than_with_one(jobs, group):
    scheduler = flooded(jobs)
    scheduler.admit("b", shape(group, evaluations=10, rows=2), images=1, client="B")
    assert turns(scheduler, 13)["b"] == 10


def test_clients_have_equal_parts_whatever_the_number_of_their_jobs():
    scheduler = flooded(50)
    for index in range(3):
        scheduler.admit(f"b{index}", shape(evaluations=1000, rows=2), images=4, client="B")
    rows = Counter(key.job[0] for _ in range(100) for key in tick(scheduler))
    assert rows["a"] == pytest.approx(rows["b"], abs=8)


def test_clients_have_parts_by_weight():
    scheduler = Scheduler(8)
    for client, weight in (("a", 1.0), ("b", 3.0)):
        for index in range(5):
            job = shape(client, evaluations=1000)
            scheduler.admit(f"{client}{index}", job, images=8, client=client, share=weight)
    rows = Counter(key.job[0] for _ in range(100) for key in tick(scheduler))
    assert rows["b"] == pytest.approx(3 * rows["a"], rel=0.1)


def test_rows_that_a_client_does_not_need_go_to_others():
    scheduler = flooded(10)
    scheduler.admit("b", shape(evaluations=10, rows=2), images=1, client="B")
    picked = scheduler.pick()
    assert picked[0].job == "b"
    assert len(picked) == 4


def test_a_priority_counts_among_the_jobs_of_its_client_alone():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape("x", 100, rows=2), images=1, priority=9, client="A")
    scheduler.admit("b", shape("x", 100, rows=2), images=1, client="B")
    assert turns(scheduler, 20) == {"a": 10, "b": 10}


def test_a_client_that_comes_does_not_catch_up_on_work_done_before():
    scheduler = flooded(10)
    scheduler.admit("b", shape("another", evaluations=1000, rows=2), images=4, client="B")
    assert turns(scheduler, 20)["b"] == 10


def test_a_client_that_sends_one_job_after_the_other_is_not_always_first():
    scheduler = flooded(10)
    rows: Counter[str] = Counter()
    for index in range(40):
        name = f"b{index}"
        scheduler.admit(name, shape("another", evaluations=1, rows=2), images=4, client="B")
        ended: set[str] = set()
        while name not in ended:
            picked = scheduler.pick()
            rows.update(key.job[0] for key in picked)
            ended = {key.job for key in scheduler.advance(picked)}
    assert rows["a"] >= rows["b"] - 8


def test_a_position_takes_the_shares_of_clients_into_account():
    scheduler = Scheduler(8)
    for index in range(5):
        scheduler.admit(f"a{index}", shape(evaluations=10, rows=2), images=4, client="A")
    scheduler.admit("b", shape(evaluations=10, rows=2), images=4, client="B")
    places = [(place.job, place.position, place.ahead) for place in scheduler.queue()]
    assert places[:3] == [("a0", 1, 0.0), ("b", 2, 80.0), ("a1", 3, 160.0)]


def test_a_limit_applies_to_the_next_call_of_its_group():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape("x"), images=8)
    scheduler.limit("y", 2)
    assert len(scheduler.pick()) == 8
    scheduler.limit("x", 3)
    assert len(scheduler.pick()) == 3
    scheduler.limit("x", 50)
    assert len(scheduler.pick()) == 8


def test_a_limit_can_be_lifted():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape(), images=8)
    scheduler.limit("g", 3)
    scheduler.limit("g", None)
    assert len(scheduler.pick()) == 8


def test_an_image_of_more_rows_than_its_limit_runs_alone():
    scheduler = Scheduler(8)
    scheduler.admit("a", shape(rows=2), images=2)
    scheduler.admit("b", shape(evaluations=50), images=2)
    scheduler.limit("g", 1)
    assert scheduler.pick() == [ImageKey("a", 0)]


@pytest.mark.parametrize("rows", [0, -1])
def test_a_limit_of_no_rows_is_refused(rows):
    with pytest.raises(ValueError, match="at least 1"):
        Scheduler(8).limit("g", rows)


def test_a_waiting_job_has_a_position_and_work_ahead():
    scheduler = Scheduler(2)
    scheduler.admit("running", shape(evaluations=2, rows=2), images=1)
    tick(scheduler)
    scheduler.admit("large", shape(evaluations=10), images=2)
    scheduler.admit("small", shape(evaluations=3), images=1)
    assert scheduler.queue() == [Position("small", 1, 2.0, 3.0), Position("large", 2, 5.0, 20.0)]
    assert scheduler.position("large") == Position("large", 2, 5.0, 20.0)


def test_a_job_that_has_started_has_no_position():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape(rows=2), images=2)
    tick(scheduler)
    assert scheduler.position("a") is None
    assert scheduler.position("never there") is None


def test_running_and_waiting_jobs_are_counted():
    scheduler = Scheduler(4)
    for name in "abc":
        scheduler.admit(name, shape(rows=2), images=1)
    tick(scheduler)
    assert (scheduler.running, scheduler.waiting, len(scheduler)) == (2, 1, 3)
    scheduler.remove("a")
    assert (scheduler.running, scheduler.waiting, len(scheduler)) == (1, 1, 2)


def test_a_queued_job_cannot_be_queued_again():
    scheduler = Scheduler(2)
    scheduler.admit("a", shape(), images=1)
    with pytest.raises(ValueError, match="queued already"):
        scheduler.admit("a", shape(), images=1)


def test_a_job_without_images_is_refused():
    with pytest.raises(ValueError, match="needs at least 1 image"):
        Scheduler(2).admit("a", shape(), images=0)


@pytest.mark.parametrize(("rows", "evaluations"), [(0, 1), (1, 0)])
def test_a_segment_without_rows_or_calls_is_refused(rows, evaluations):
    with pytest.raises(ValueError, match="at least 1 call of 1 row"):
        Segment("g", rows, evaluations, 1.0)


def test_rows_that_an_image_needs_no_more_go_to_other_images():
    scheduler = Scheduler(2)
    scheduler.admit("a", Shape((Segment("g", 2, 2, 1.0), Segment("g", 1, 2, 1.0))), images=1)
    scheduler.admit("b", shape(evaluations=9), images=1)
    assert [[key.job for key in tick(scheduler)] for _ in range(5)] == [
        ["a"],
        ["a"],
        ["a", "b"],
        ["a", "b"],
        ["b"],
    ]


def test_the_work_of_a_job_is_that_of_all_its_segments():
    scheduler = Scheduler(8)
    phases = (Segment("g", 2, 3, 1.0), Segment("g", 1, 2, 1.0), Segment("h", 1, 4, 10.0))
    scheduler.admit("a", Shape(phases), images=2)
    assert scheduler.work == 2 * (2 * 3 + 2 + 40)
    turns(scheduler, 4)
    assert scheduler.work == 2 * (1 + 40)


def test_a_job_starts_its_next_phase_when_it_proceeds():
    scheduler = Scheduler(8)
    scheduler.admit("a", Shape((Segment("g", 2, 1, 1.0), Segment("h", 1, 2, 4.0))), images=2)
    images = [ImageKey("a", 0), ImageKey("a", 1)]
    assert scheduler.advance(scheduler.pick()) == images
    assert scheduler.pick() == [], "its images are prepared now"
    assert (len(scheduler), scheduler.running, scheduler.work) == (1, 1, 16.0)
    scheduler.proceed("a")
    assert tick(scheduler) == images
    assert scheduler.advance(scheduler.pick()) == images
    assert len(scheduler) == 0


def test_a_job_between_two_phases_can_be_removed():
    scheduler = Scheduler(8)
    scheduler.admit("a", Shape((Segment("g", 2, 1, 1.0), Segment("h", 1, 2, 4.0))), images=1)
    scheduler.admit("b", shape("g"), images=1)
    tick(scheduler)
    scheduler.remove("a")
    assert (len(scheduler), scheduler.running) == (1, 1)
    assert last_calls(scheduler) == {"b": 2}


def test_a_job_in_its_second_phase_is_still_the_oldest():
    scheduler = Scheduler(2, patience=1)
    scheduler.admit("old", Shape((Segment("g", 2, 1, 1.0), Segment("h", 2, 1, 1.0))), images=1)
    tick(scheduler)
    scheduler.proceed("old")
    for name in "abc":
        scheduler.admit(name, shape("h", 1, rows=2), images=1, priority=9)
    assert [tick(scheduler)[0].job for _ in range(2)] == ["a", "old"]


def test_the_row_cost_of_a_group_cannot_change():
    with pytest.raises(ValueError, match="row cost"):
        Scheduler(2).admit("a", Shape((Segment("g", 2, 1, 1.0), Segment("g", 1, 1, 2.0))), images=1)


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
        job = shape("g", evaluations, row_cost=0.5, rows=2)
        scheduler.admit(str(len(arrivals)), job, 1, priority)
        arrivals.append((now, evaluations, 4.0**priority))
    run(math.inf)
    assert all(ends[str(index)] <= fair + 1e-6 for index, fair in enumerate(fair_ends(arrivals)))


CLIENTS = {"": 1.0, "light": 0.1, "heavy": 20.0}  # their weights
COSTS = {"x": 1.0, "y": 3.0, "z": 0.25}


class History:
    """A scheduler, and a model of what must be true of it."""

    def __init__(self, max_rows: int) -> None:
        self.scheduler = Scheduler(max_rows)
        self.max_rows = max_rows
        self.limits: dict[str, int | None] = {}
        self.calls: dict[
            ImageKey, list[Segment]
        ] = {}  # those to come of each image, one Segment for each call
        self.ended: set[ImageKey] = set()  # images that have ended a phase
        self.parked: dict[str, None] = {}  # jobs all of whose images have
        self.work = 0.0
        self.bounds: dict[str, float] = {}
        self.names = count()

    @property
    def jobs(self) -> set[str]:
        return {key.job for key in self.calls}

    def admit(
        self, segments: list[tuple[str, int, int]], images: int, priority: int, client: str = ""
    ) -> None:
        name = str(next(self.names))
        shape = Shape(tuple(Segment(group, rows, calls, COSTS[group]) for group, rows, calls in segments))
        self.scheduler.admit(name, shape, images, priority, client, CLIENTS[client])
        for index in range(images):
            key = ImageKey(name, index)
            self.calls[key] = [segment for segment in shape.segments for _ in range(segment.evaluations)]
        full_call = self.max_rows * max(COSTS.values())
        steps = sum(map(len, self.calls.values()))
        self.bounds[name] = self.work + (PATIENCE + 2) * steps * full_call

    def remove(self, number: int) -> None:
        self.scheduler.remove(str(number))
        self.parked.pop(str(number), None)
        for key in [key for key in self.calls if key.job == str(number)]:
            del self.calls[key]

    def proceed(self) -> None:
        """The job that has been between two phases for the longest time starts the next one."""
        if self.parked:
            job = next(iter(self.parked))
            del self.parked[job]
            self.ended = {key for key in self.ended if key.job != job}
            self.scheduler.proceed(job)

    def limit(self, group: str, rows: int | None) -> None:
        self.scheduler.limit(group, rows)
        self.limits[group] = rows

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.call()

    def flood(self, group: str, calls: int, images: int) -> None:
        for _ in range(calls):
            self.admit([(group, 2, 1)], images, 9)
            self.call()

    def call(self) -> None:
        picked = self.scheduler.pick()
        self.check(picked)
        segments = [self.calls[key].pop(0) for key in picked]
        work = sum(segment.rows * segment.row_cost for segment in segments)
        self.work += work
        for job in self.parked:
            self.bounds[job] += work
        ended = [
            key
            for key, segment in zip(picked, segments, strict=True)
            if not self.calls[key] or self.calls[key][0].group != segment.group
        ]
        assert sorted(self.scheduler.advance(picked)) == sorted(ended)
        for key in ended:
            assert self.work <= self.bounds[key.job]
            if not self.calls[key]:
                del self.calls[key]
        self.ended.update(key for key in ended if key in self.calls)
        for job in self.jobs - {key.job for key in self.calls.keys() - self.ended}:
            self.parked[job] = None

    def check(self, picked: list[ImageKey]) -> None:
        """Check that images are unfinished, of one group, unique, within its limit, and as many as fit."""
        free = self.calls.keys() - self.ended
        assert bool(picked) <= bool(free)
        assert set(picked) <= set(free)
        assert len(set(picked)) == len(picked)
        assert len({self.calls[key][0].group for key in picked}) <= 1
        if picked:
            group = self.calls[picked[0]][0].group
            limit = min(self.limits.get(group) or self.max_rows, self.max_rows)
            rows = sum(self.calls[key][0].rows for key in picked)
            assert rows <= limit or len(picked) == 1
            waiting = [self.calls[key][0] for key in free if key not in picked]
            others = [segment.rows for segment in waiting if segment.group == group]
            assert not others or rows + max(others) > limit

    def check_queue(self) -> None:
        places = self.scheduler.queue()
        assert [place.position for place in places] == list(range(1, self.scheduler.waiting + 1))
        assert self.scheduler.running + self.scheduler.waiting == len(self.scheduler) == len(self.jobs)
        assert all(place.ahead >= 0 and place.job in self.jobs for place in places)
        segments = [segment for calls in self.calls.values() for segment in calls]
        assert self.scheduler.work == pytest.approx(sum(one.rows * one.row_cost for one in segments))


groups = st.sampled_from(list(COSTS))
segments = st.lists(st.tuples(groups, st.integers(1, 3), st.integers(1, 8)), min_size=1, max_size=4)
moves = st.one_of(
    st.tuples(
        st.just(History.admit),
        segments,
        st.integers(1, 4),
        st.integers(-2, 9),
        st.sampled_from(list(CLIENTS)),
    ),
    st.tuples(st.just(History.remove), st.integers(0, 20)),
    st.tuples(st.just(History.proceed)),
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
    while history.calls:
        history.call()
        history.proceed()
    for group in COSTS:
        history.scheduler.limit(group, None)
    assert history.scheduler.pick() == []
    kept = vars(history.scheduler) | vars(history.scheduler._shares)
    assert not any(value for value in kept.values() if isinstance(value, Sized))

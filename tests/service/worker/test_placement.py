"""Which replica runs a job. In these tests a call takes `fixed + rows * row` seconds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from service.engine.events import JobSteps, Stepped
from service.engine.job import Job, LoraWeights, ModelKey
from service.worker.call_times import CallTimes
from service.worker.placement import LOAD_SECONDS, Move, Placement
from tests.helpers.fake_runner import make_job
from tests.helpers.plain_placement import PlainPlacement

BOTH = (0, 1)
CPU, GPU = (0.0, 0.05), (0.05, 0.001)  # fixed, row
INK = LoraWeights("ink", 1.0, 1.0)


def placement(fixed: float = 0.0, row: float = 0.05, replicas: tuple[int, ...] = BOTH) -> Placement:
    """Replicas that hold model m, and know how long its calls take."""
    made = Placement(max_rows=8)
    for replica in replicas:
        made.hold(replica, [ModelKey("m")])
    made.send(make_job("known"), 0)
    for rows in (2, 2, 8):
        made.step(Stepped(rows, rows, 1, fixed + rows * row, 1, 0, (JobSteps("known", 1, rows),)))
    made.remove("known")
    return made


def give(made: Placement, replica: int, *jobs: Job, started: bool = True) -> None:
    """Send jobs to a replica."""
    for job in jobs:
        made.send(job, replica)
        if started:
            made.start(job.id, job.n * job.steps)


def test_a_job_goes_to_the_replica_with_the_least_work_left():
    made = placement()
    give(made, 0, make_job("long", steps=50))
    give(made, 1, make_job("short", steps=40))
    assert made.choose(make_job("new"), BOTH) == 1
    made.step(Stepped(2, 2, 1, 0.1, 1, 0, (JobSteps("long", 45, 2),)))
    assert made.choose(make_job("new"), BOTH) == 0


def test_work_is_in_seconds_and_not_in_jobs_or_steps():
    made = placement()
    give(made, 0, *(make_job(str(number), steps=2) for number in range(4)))
    give(made, 1, make_job("large", width=64, height=64, steps=8))
    assert made.work(0) == pytest.approx(4 * 2 * 2 * 0.05)
    assert made.work(1) > 10 * made.work(0)
    assert made.choose(make_job("new"), BOTH) == 0


@pytest.mark.parametrize(("device", "expected"), [(CPU, 1), (GPU, 0)])
def test_a_job_joins_jobs_of_its_kind_only_where_that_costs_them_little(device, expected):
    made = placement(*device)
    give(made, 0, make_job("running", steps=20))
    assert made.choose(make_job("new", steps=20), BOTH) == expected


@pytest.mark.parametrize(("steps", "expected"), [(20, 0), (200, 1)])
def test_a_replica_that_holds_the_model_is_preferred_while_the_wait_is_worth_less_than_the_load(
    steps, expected
):
    made = placement()
    made.hold(1, [ModelKey("other")])
    give(made, 0, make_job("running", steps=steps))  # 2 or 20 s
    assert 2 < LOAD_SECONDS < 20
    assert made.choose(make_job("new", steps=2), BOTH) == expected


def test_a_measured_load_replaces_the_assumed_one():
    made = placement()
    made.hold(1, [])
    give(made, 0, make_job("running", steps=20))  # 2 s
    made.load(ModelKey("m"), 0.1)
    assert made.choose(make_job("new"), BOTH) == 1


def test_a_replica_that_holds_the_set_of_loras_is_preferred():
    made = placement()
    made.hold(1, [ModelKey("m"), ModelKey("m", (INK,))])
    assert made.choose(make_job("new", loras=(INK,)), BOTH) == 1


def test_a_model_that_a_replica_will_load_for_another_job_is_not_loaded_twice():
    made = placement()
    give(made, 1, make_job("first", model="new model", steps=1), started=False)
    assert made.choose(make_job("second", model="new model", steps=1), BOTH) == 1


def test_a_waiting_job_moves_to_an_idle_replica():
    made = placement()
    give(made, 0, make_job("running", steps=20))
    give(made, 0, make_job("a"), make_job("b"), started=False)
    assert made.moves(BOTH) == [Move("a", 0, 1)]
    assert made.moves(BOTH) == [], "one at a time"
    made.remove("a")
    give(made, 1, make_job("a"))
    assert made.moves(BOTH) == [Move("b", 0, 1)]


@pytest.mark.parametrize(
    ("steps", "started", "among"),
    [(20, True, BOTH), (0, False, BOTH), (20, False, (0,))],
    ids=["started", "soon", "reserved"],
)
def test_a_job_stays(steps, started, among):
    """One that has started, one that has little to wait for, and one without a replica to go to."""
    made = placement()
    if steps:
        give(made, 0, make_job("running", steps=steps))
    give(made, 0, make_job("a"), started=started)
    assert made.moves(among) == []


def test_a_job_that_has_just_been_placed_does_not_move():
    for device in (CPU, GPU):
        made = placement(*device)
        for number in range(30):
            size = 8 * (1 + number % 2)
            job = make_job(str(number), steps=1 + number * 7 % 20, n=1 + number % 3, width=size)
            give(made, made.choose(job, BOTH), job, started=False)
            assert job.id not in [move.job for move in made.moves(BOTH)]


def test_a_job_that_starts_before_it_can_move_stays():
    made = placement()
    give(made, 0, make_job("running", steps=20))
    give(made, 0, make_job("a"), started=False)
    assert made.moves(BOTH) == [Move("a", 0, 1)]
    made.start("a", 3)
    assert made.work(1) == 0
    assert made.work(0) > 20 * 2 * 0.05


def test_a_worker_that_ends_takes_its_jobs_and_models_with_it():
    made = placement()
    give(made, 0, make_job("a", steps=50))
    made.clear(0)
    assert made.work(0) == 0
    made.remove("a")  # it may be sent again
    assert made.choose(make_job("a"), BOTH) == 1, "where the model is loaded"


def test_a_job_does_not_move_to_a_worker_that_has_ended():
    made = placement()
    give(made, 0, make_job("running", steps=20))
    give(made, 0, make_job("a"), started=False)
    assert made.moves(BOTH) == [Move("a", 0, 1)]
    made.clear(1)
    assert made.work(1) == 0
    assert made.moves((0,)) == []
    made.remove("a")
    assert made.work(0) == pytest.approx(20 * 2 * 0.05)


def test_call_times_are_linear_in_the_rows_and_follow_changes():
    times = CallTimes()
    for rows in (2, 2, 4, 8, 4, 2):
        times.record("kind", 64, rows, 0.5 + 0.1 * rows)
    assert times.seconds("kind", 64, 6) == pytest.approx(1.1)
    for rows in (2, 4, 8) * 100:
        times.record("kind", 64, rows, 0.2 * rows)
    assert times.seconds("kind", 64, 6) == pytest.approx(1.2, rel=0.01)


def test_an_unknown_kind_is_estimated_from_the_others_by_pixels():
    times = CallTimes()
    for rows in (2, 2, 4, 8):
        times.record("small", 100, rows, 0.1 * rows)
    assert times.seconds("large", 400, 2) == pytest.approx(0.8)
    assert CallTimes().seconds("large", 400, 2) > CallTimes().seconds("small", 100, 2) > 0


@pytest.mark.parametrize("seed", range(6))
def test_kept_sums_and_bounds_change_no_placement(seed):
    draws = random.Random(seed)
    replicas = range(draws.choice((2, 3, 8)))
    fast, plain = Placement(max_rows=32), PlainPlacement(max_rows=32)
    jobs: dict[str, Job] = {}
    moved = 0
    for event in random_events(draws, len(replicas), jobs):
        event(fast)
        event(plain)
        job = make_job("new", model=draws.choice("abc"), steps=20)
        assert fast.choose(job, replicas) == plain.choose(job, replicas)
        moves = fast.moves(replicas)
        assert moves == plain.moves(replicas)
        for move in moves:
            for made in (fast, plain):
                made.remove(move.job)
                made.send(jobs[move.job], made.choose(jobs[move.job], replicas))
        moved += len(moves)
    assert moved > 10


def random_events(
    draws: random.Random, replicas: int, jobs: dict[str, Job]
) -> Iterator[Callable[[Placement], object]]:
    """What could happen at replicas that hold different models; most jobs come to the first."""
    for number in range(replicas):
        held = [ModelKey("abc"[number % 3])]
        yield lambda made, number=number, held=held: made.hold(number, held)
    steps: dict[str, int] = {}
    for number in range(150):
        what = draws.random()
        if what < 0.4 or not jobs:
            loras = (INK,) if draws.random() < 0.1 else ()
            size, n = draws.choice((64, 128)), draws.choice((1, 1, 4))
            job = make_job(
                str(number), model=draws.choice("aab"), loras=loras, width=size, height=size, n=n,
                steps=draws.choice((10, 50)), guidance_scale=draws.choice((1.0, 5.0)),
            )  # fmt: skip
            jobs[job.id] = job
            place = draws.randrange(replicas) if draws.random() < 0.5 else 0
            yield lambda made, job=job, place=place: made.send(job, place)
        elif what < 0.6:
            job = draws.choice(list(jobs.values()))
            steps.setdefault(job.id, 0)
            yield lambda made, job=job: made.start(job.id, job.n * job.steps)
        elif what < 0.85 and steps:
            job = jobs[draws.choice(list(steps))]
            steps[job.id] += job.n
            call = Stepped(2, 2, 1, draws.uniform(0.01, 0.02), 1, 0, (JobSteps(job.id, steps[job.id], 2),))
            yield lambda made, call=call: made.step(call)
        elif what < 0.95:
            job = jobs.pop(draws.choice(list(jobs)))
            steps.pop(job.id, None)
            yield lambda made, job=job: made.remove(job.id)
        else:
            seconds = draws.uniform(0.1, 6)
            yield lambda made, seconds=seconds: made.load(ModelKey("a"), seconds)

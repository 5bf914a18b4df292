"""The rule for jobs that make workers die, on simulated workers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import repeat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.worker.quarantine import QUIET_SECONDS, Cause, Quarantine

pytestmark = pytest.mark.slow

NEVER = float("inf")
TICK = 0.05  # seconds of a simulated step


class OneWorker(Quarantine):
    """A quarantine for a single worker, which gets every job that is released."""

    def give(self, age: float) -> list[str]:
        """Send the worker, ready for `age` seconds, all that it may have; returns those jobs."""
        released = self.release({0: age})
        jobs = [released.suspect] if released.suspect else [] if released.reserved == 0 else released.jobs
        for job in jobs:
            self.send(job, 0)
        return jobs

    def die(self, cause: Cause, age: float) -> list[str]:
        return self.end(0, cause, age)


@dataclass
class Poison:
    """How a job makes its worker die: after so many of its steps, before it has even started (-1), or at any
    step (None)."""

    cause: Cause
    step: int | None
    draw: random.Random = field(default_factory=lambda: random.Random(1))

    def strikes(self, steps: int) -> bool:
        return self.draw.random() < 0.1 if self.step is None else steps == self.step


@dataclass
class World:
    """Jobs (name -> steps), those of them that make workers die, and at which age somebody kills each worker.

    Every job in the worker takes one step a tick.
    """

    jobs: dict[str, int]
    kills: Iterator[float]
    poisons: dict[str, Poison] = field(default_factory=dict)
    lives: int = 0
    seconds: float = 0.0  # for which workers were ready
    refused_at: float = 0.0  # seconds, of the last refusal
    done: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    def run(self, max_lives: int = 10_000) -> World:
        """Until every job is done or refused."""
        quarantine = OneWorker()
        for job in self.jobs:
            quarantine.add(job)
        while len(self.done | self.refused) < len(self.jobs):
            assert self.lives < max_lives, "the workers die for ever"
            self.lives += 1
            end = self.live(quarantine, next(self.kills))
            if end and (guilty := quarantine.die(*end)):
                self.refused.update(guilty)
                self.refused_at = self.seconds
        return self

    def live(self, quarantine: OneWorker, kill_at: float) -> tuple[Cause, float] | None:
        """One worker; its end, or None when no job is left."""
        age, steps = 0.0, dict.fromkeys(quarantine.give(0.0), -1)
        while len(self.done | self.refused) < len(self.jobs):
            assert steps or quarantine.quiet_left({0: age}) > 0, "nothing runs, and nothing will"
            age += TICK
            self.seconds += TICK
            if age > kill_at:
                return "kill", kill_at
            for job in list(steps):
                poison = self.poisons.get(job)
                if poison and poison.strikes(steps[job]):
                    return poison.cause, age
                steps[job] += 1
                if steps[job] == 0:
                    quarantine.start(job)
                quarantine.step(job, max(steps[job], 0))
                if steps[job] >= self.jobs[job]:
                    del steps[job]
                    self.done.add(job)
                    quarantine.remove(job)
            steps |= dict.fromkeys(quarantine.give(age), -1)
        return None


def names(count: int, steps: Callable[[int], int]) -> dict[str, int]:
    return {f"healthy {number}": steps(number) for number in range(count)}


@settings(max_examples=300)
@given(st.integers(1, 8), st.lists(st.floats(0, QUIET_SECONDS), max_size=30))
def test_no_job_is_refused_when_workers_are_killed_right_after_they_are_ready(count, ages):
    world = World(names(count, lambda i: 20 + 7 * i), iter([*ages, *repeat(NEVER, 100)]))
    assert world.run().refused == set()


@settings(max_examples=300)
@given(st.integers(1, 4), st.integers(10, 200), st.floats(0, 20), st.integers(1, 30))
def test_no_job_is_refused_when_workers_are_killed_at_one_age(count, steps, age, times):
    world = World(names(count, lambda i: steps), iter([*repeat(age, times), *repeat(NEVER, 100)]))
    assert world.run().refused == set()


@settings(max_examples=300)
@given(st.integers(1, 4), st.integers(10, 200), st.floats(0, 10), st.floats(0.01, 0.3), st.randoms())
def test_no_job_is_refused_when_workers_are_killed_at_about_one_age(count, steps, age, jitter, draw):
    kills = (age * (1 + draw.uniform(-jitter, jitter)) for _ in range(30))
    world = World(names(count, lambda i: steps), iter([*kills, *repeat(NEVER, 100)]))
    assert world.run().refused == set()


def test_no_job_is_refused_when_workers_are_killed_at_random():
    """In 2,000 histories of 40 kills, each in the first seconds of a worker's life."""
    refused = 0
    for seed in range(2000):
        draw = random.Random(seed)
        longest = draw.uniform(0.5, 10)
        kills = [draw.uniform(0, longest) for _ in range(40)]
        jobs = names(draw.randint(1, 6), lambda i, draw=draw: draw.randint(5, 100))
        refused += len(World(jobs, iter([*kills, *repeat(NEVER, 100)])).run().refused)
    assert refused == 0


@settings(max_examples=300)
@given(
    st.integers(0, 6),
    st.sampled_from(["crash", "kill"]),
    st.integers(-1, 60),
    st.integers(0, 6),
)
def test_a_job_that_makes_workers_die_is_refused_within_the_bound(count, cause, step, place):
    jobs = list(names(count, lambda i: 20 + 5 * i).items())
    jobs.insert(min(place, count), ("poison", 100))
    world = World(dict(jobs), repeat(NEVER), {"poison": Poison(cause, step)}).run(8)
    assert world.refused == {"poison"}
    own, others = (step + 2) * TICK, sum(20 + 5 * i for i in range(count)) * TICK
    bound = 6 * own + 2 * (others + 1) if cause == "crash" else 13 * own + 9 * others + 7
    assert world.lives <= (6 if cause == "crash" else 7)
    assert world.refused_at <= bound + 10 * TICK


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["crash", "kill"]), st.integers(-1, 30)), max_size=4))
def test_several_jobs_that_make_workers_die_are_all_refused_and_no_other(poisons):
    guilty = {f"poison {number}": Poison(*poison) for number, poison in enumerate(poisons)}
    jobs = names(4, lambda i: 20 + 5 * i) | dict.fromkeys(guilty, 100)
    world = World(jobs, repeat(NEVER), guilty).run(8 + 8 * len(guilty))
    assert world.refused == set(guilty)


@pytest.mark.parametrize("cause", ["crash", "kill"])
def test_a_job_that_makes_workers_die_is_found_although_others_kill_workers_too(cause):
    for seed in range(100):
        draw = random.Random(seed)
        kills = (draw.choice((NEVER, draw.uniform(0, 3))) for _ in iter(int, 1))
        world = World(names(3, lambda i: 30) | {"poison": 100}, kills, {"poison": Poison(cause, 4)})
        assert world.run(1000).refused == {"poison"}


def test_a_kill_at_another_step_each_time_is_evidence_too():
    world = World({"poison": 1000, "healthy": 20}, repeat(NEVER), {"poison": Poison("kill", None)}).run(12)
    assert world.refused == {"poison"}


def test_suspects_run_one_at_a_time_and_others_together():
    quarantine = OneWorker()
    for job in "ab":
        quarantine.add(job)
    assert quarantine.give(0.0) == ["a", "b"]
    for _ in range(2):
        quarantine.give(0.0)
        quarantine.die("crash", 1.0)
    quarantine.add("c")
    assert quarantine.give(0.0) == ["c"]
    assert quarantine.quiet_left({0: 0.4}) == pytest.approx(0.6)
    assert quarantine.give(1.0) == []
    assert quarantine.worker_of("c") == 0
    quarantine.remove("c")
    assert quarantine.give(1.0) == ["a"]
    assert quarantine.give(2.0) == []
    quarantine.remove("a")
    assert quarantine.give(2.0) == ["b"]


def test_a_kill_of_a_worker_without_the_job_clears_it_of_all_kills():
    quarantine = OneWorker()
    quarantine.add("a")
    for _ in range(2):  # now it is a suspect
        assert quarantine.give(0.0) == ["a"]
        assert quarantine.die("kill", 1.0) == []

    def kill_alone(age: float) -> list[str]:
        assert quarantine.give(age) == ["a"]
        return quarantine.die("kill", age)

    assert [kill_alone(age) for age in (2.0, 4.0)] == [[], []]
    assert quarantine.give(0.5) == []
    assert quarantine.die("kill", 0.5) == []
    assert [kill_alone(age) for age in (2.0, 4.0, 8.0)] == [[], [], ["a"]]


@dataclass
class Fleet:
    """Several workers, which get the released jobs in turn; a poison job ends the worker that it is in.

    Every job in a worker takes one step a tick. A worker that has died is ready again in the next tick.
    """

    jobs: dict[str, int]
    poisons: dict[str, Poison]
    workers: int
    kills: Callable[[], bool] = lambda: False  # whether somebody kills a worker in this tick
    refused: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)

    def run(self, max_ticks: int = 20_000) -> Fleet:
        """Until every job is done or refused."""
        quarantine = Quarantine()
        for job in self.jobs:
            quarantine.add(job)
        ages = dict.fromkeys(range(self.workers), 0.0)
        steps: dict[str, int] = {}
        for tick in range(max_ticks):
            if self.done | self.refused == set(self.jobs):
                return self
            self.send(quarantine, ages, steps, tick)
            for worker in ages:
                ages[worker] += TICK
                if cause := self.tick(quarantine, worker, steps):
                    for job in quarantine.jobs_of(worker):
                        del steps[job]
                    self.refused.update(quarantine.end(worker, cause, ages[worker]))
                    ages[worker] = 0.0
        raise AssertionError("jobs are left")

    def send(self, quarantine: Quarantine, ages: dict[int, float], steps: dict[str, int], turn: int) -> None:
        released = quarantine.release(ages)
        others = [worker for worker in ages if worker != released.reserved]
        places = [(job, others[(turn + i) % len(others)]) for i, job in enumerate(released.jobs) if others]
        if released.suspect is not None:
            places.append((released.suspect, released.reserved))
        for job, worker in places:
            quarantine.send(job, worker)
            steps[job] = -1

    def tick(self, quarantine: Quarantine, worker: int, steps: dict[str, int]) -> Cause | None:
        """One step of a worker; the cause of its end, if it ends."""
        suspects = [job for job in quarantine.jobs_of(worker) if quarantine._records[job].suspect]
        assert not suspects or quarantine.jobs_of(worker) == suspects[:1], "a suspect is alone"
        if self.kills():
            return "kill"
        for job in quarantine.jobs_of(worker):
            poison = self.poisons.get(job)
            if poison and poison.strikes(steps[job]):
                return poison.cause
            steps[job] += 1
            if steps[job] == 0:
                quarantine.start(job)
            quarantine.step(job, max(steps[job], 0))
            if steps[job] >= self.jobs[job]:
                del steps[job]
                self.done.add(job)
                quarantine.remove(job)
        return None


@settings(max_examples=100)
@given(
    st.integers(2, 4),
    st.lists(st.tuples(st.sampled_from(["crash", "kill"]), st.integers(-1, 30)), max_size=3),
    st.integers(0, 8),
)
def test_with_several_workers_exactly_the_jobs_that_make_workers_die_are_refused(workers, poisons, healthy):
    guilty = {f"poison {number}": Poison(*poison) for number, poison in enumerate(poisons)}
    jobs = names(healthy, lambda i: 20 + 5 * i) | dict.fromkeys(guilty, 100)
    assert Fleet(jobs, guilty, workers).run().refused == set(guilty)


def test_with_several_workers_no_job_is_refused_when_workers_are_killed_at_random():
    for seed in range(100):
        draw, left = random.Random(seed), iter(range(40))

        def kill(draw: random.Random = draw, left: Iterator[int] = left) -> bool:
            return draw.random() < 0.03 and next(left, None) is not None

        assert Fleet(names(6, lambda i: 30 + 10 * i), {}, 3, kill).run().refused == set()


def test_other_workers_go_on_while_a_suspect_runs():
    quarantine = Quarantine()
    quarantine.add("suspect")
    quarantine.add("neighbour")
    for _ in range(2):
        for job in ("suspect", "neighbour"):
            quarantine.send(job, 0)
        quarantine.start("suspect")
        quarantine.end(0, "crash", 10.0)
    quarantine.remove("neighbour")
    for job in "abc":
        quarantine.add(job)
    quarantine.send("a", 0)
    quarantine.send("b", 1)
    quarantine.send("c", 1)
    released = quarantine.release({0: 10.0, 1: 10.0})
    assert (released.reserved, released.suspect) == (0, None), "the one with fewer jobs is reserved"
    quarantine.remove("a")
    assert quarantine.release({0: 10.0, 1: 10.0}).suspect == "suspect"
    quarantine.send("suspect", 0)
    quarantine.add("d")
    assert quarantine.release({0: 10.0, 1: 10.0}) == (["d"], 0, None)

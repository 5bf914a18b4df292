"""The engine's loop, on a runner that counts steps instead of computing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.engine import REPORT_SECONDS
from service.engine.events import (
    Cancelled,
    Decoded,
    Done,
    Failed,
    Incident,
    Overflowed,
    Previewed,
    QueuePositions,
    Started,
    Stepped,
)
from service.engine.job import ImageKey, Job, ModelKey
from service.engine.runner import Call
from service.errors import OutOfMemory
from tests.helpers.fake_runner import Clock, CountingRunner, engine_on, make_job, of, outcomes, run


def test_images_are_in_the_order_of_their_seeds():
    events, _ = run([make_job("a", n=5, seed=7)], max_rows=4)
    assert events[-1].images == (b"7", b"8", b"9", b"10", b"11")


def test_jobs_with_different_numbers_of_steps_share_calls():
    events, _ = run(
        [make_job("a", steps=10), make_job("b", steps=3), make_job("c", steps=7, guidance_scale=1.0)]
    )
    rows = [event.rows for event in events if isinstance(event, Stepped)]
    assert rows == [5] * 3 + [3] * 4 + [2] * 3


def test_one_bad_job_fails_alone():
    events, _ = run([make_job("good"), make_job("bad", prompt="step"), make_job("too")])
    assert {event.job for event in events if isinstance(event, Done)} == {"good", "too"}
    assert [event for event in events if isinstance(event, Failed)] == [Failed("bad", "job_failed")]


def test_an_image_of_nan_values_is_an_error():
    events, _ = run([make_job("a", prompt="finish")])
    assert events[-1] == Failed("a", "non_finite")


def test_a_cancelled_job_is_not_in_the_next_call():
    engine, events = engine_on(CountingRunner())
    engine.submit(make_job("a", steps=100))
    engine.submit(make_job("b", steps=100))
    engine.tick()
    engine.cancel("a")
    engine.tick()
    assert [event.rows for event in events if isinstance(event, Stepped)] == [4, 2]
    assert Cancelled("a") in events


def test_an_interrupted_job_ends_with_its_images_as_they_are():
    runner = CountingRunner()
    engine, events = engine_on(runner)
    engine.submit(make_job("a", steps=100, n=2, prompt="interrupted"))
    engine.submit(make_job("b", steps=20))
    for _ in range(5):
        engine.tick()
    for name in ("a", "a", "unknown"):
        engine.interrupt(name)
    while engine.busy:
        engine.tick()
    assert [(event.job, len(event.images)) for event in of(events, Done)] == [("a", 2), ("b", 1)]
    assert runner.steps[ImageKey("a", 0)] == 5


def test_rows_that_a_job_needs_no_more_are_free():
    events, _ = run(
        [make_job("a", steps=3, n=2, sampler="interval"), make_job("b", steps=5, n=2)], max_rows=6
    )
    rows = [{part.job: part.rows for part in event.jobs} for event in of(events, Stepped)]
    assert rows == [{"a": 4, "b": 2}, {"a": 4, "b": 2}, {"a": 2, "b": 4}, *([{"b": 4}] * 3)]


def test_a_job_passes_through_two_groups_with_one_count_of_steps():
    events, runner = run([make_job("a", steps=3, n=2, sampler="two_phases", preview_every=2)])
    assert of(events, Started) == [Started("a", 6)]
    assert [event.jobs[0].steps for event in of(events, Stepped)] == [2, 4, 6]
    assert [(event.index, event.step) for event in of(events, Previewed)] == [(0, 2), (1, 2)]
    assert runner.prepared == {ImageKey("a", 0): 2, ImageKey("a", 1): 2}


def test_a_job_between_two_phases_can_be_cancelled():
    engine, events = engine_on(CountingRunner(), decode_chunk=1)
    engine.submit(make_job("a", steps=3, n=2, sampler="two_phases"))
    engine.tick()
    assert engine.scheduler.pick() == []
    engine.cancel("a")
    assert not engine.busy
    assert outcomes(events) == {"a": "cancelled"}


def test_an_interrupted_job_between_two_phases_is_decoded_as_it_is():
    runner = CountingRunner()
    engine, events = engine_on(runner, decode_chunk=1)
    engine.submit(make_job("a", steps=3, n=2, sampler="two_phases", prompt="interrupted"))
    engine.tick()
    assert engine.scheduler.pick() == []
    engine.interrupt("a")
    while engine.busy:
        engine.tick()
    assert outcomes(events) == {"a": "done"}
    assert runner.steps.total() == 2


def test_other_jobs_run_while_a_job_is_prepared():
    engine, events = engine_on(CountingRunner((4,)), decode_chunk=1)
    engine.submit(make_job("a", steps=2, n=2, sampler="two_phases"))
    engine.submit(make_job("b", steps=20))
    while engine.busy:
        engine.tick()
    calls = [{part.job for part in event.jobs} for event in of(events, Stepped)]
    first, last = (index for index, jobs in enumerate(calls) if "a" in jobs)
    assert last > first + 2
    assert all(jobs == {"b"} for jobs in calls[first + 1 : last])


def test_a_call_that_does_not_fit_is_split_and_later_calls_are_smaller():
    engine, events = engine_on(CountingRunner((2, 4, 8), fits_rows=4))
    for i in range(8):
        engine.submit(make_job(str(i), steps=4, guidance_scale=1.0))
    while engine.busy:
        engine.tick()
    assert set(outcomes(events).values()) == {"done"}
    rows = [event.rows for event in of(events, Stepped)]
    assert rows[1:4] == [4, 4, 4], "8 in two halves, and no 8 again"
    assert max(rows) == 4


def test_a_job_that_does_not_fit_alone_fails_alone():
    jobs = [make_job(str(i)) for i in range(3)] + [make_job("poison", prompt="oom")]
    events, _ = run(jobs)
    assert outcomes(events) == {"0": "done", "1": "done", "2": "done", "poison": "out_of_memory"}


def test_a_new_group_starts_with_small_calls_which_grow_as_far_as_memory_allows():
    runner = CountingRunner((2, 4, 8, 16), fits_rows=8)
    runner.measures = True
    engine, events = engine_on(runner)
    for i in range(16):
        engine.submit(make_job(str(i), steps=3, guidance_scale=1.0))
    while engine.busy:
        engine.tick()
    rows = [event.rows for event in of(events, Stepped)]
    assert rows[0] == 2
    assert max(rows) == 8
    assert set(outcomes(events).values()) == {"done"}


def test_a_job_with_nan_values_runs_again_in_float32():
    events, _ = run([make_job("good"), make_job("bad", prompt="broken"), make_job("so-so", prompt="wobbly")])
    assert outcomes(events) == {"good": "done", "bad": "non_finite", "so-so": "done"}
    assert sorted(event.job for event in of(events, Started)) == ["bad", "good", "so-so"]
    steps = [part.steps for event in of(events, Stepped) for part in event.jobs if part.job == "so-so"]
    assert steps == sorted(steps), "the count never goes back"


def test_jobs_that_need_float32_are_counted_for_their_model():
    events, runner = run([make_job("a"), *(make_job(name, prompt="wobbly") for name in "bcd")])
    assert sorted(runner.overflows) == ["b", "c", "d"]
    assert of(events, Overflowed) == [Overflowed("m")]


def test_positions_and_estimates_of_waiting_jobs_are_reported():
    engine, events = engine_on(CountingRunner((2,)))
    engine.submit(make_job("a", steps=3))
    engine.tick()
    assert not of(events, QueuePositions), "no job waits"
    engine.submit(make_job("b", steps=10))
    engine.submit(make_job("c", steps=20))
    engine.tick()
    pace = (0.01 + 0.02) / 2  # of the fake's steps, for one row
    (report,) = of(events, QueuePositions)
    assert [place[:2] for place in report.positions] == [("b", 1), ("c", 2)]
    assert report.positions[0][2] == pytest.approx(pace * 2 * (2 + 10))
    assert report.positions[1][2] == pytest.approx(pace * 2 * (2 + 10 + 20))
    while engine.busy:
        engine.tick()
    assert len(of(events, QueuePositions)) <= 1 + engine.clock() / REPORT_SECONDS


def test_a_failed_preview_does_not_fail_its_job():
    jobs = [make_job("a", steps=5, preview_every=2, n=2), make_job("b", prompt="preview", preview_every=1)]
    events, _ = run(jobs)
    assert [(e.job, e.index, e.step) for e in of(events, Previewed)] == [
        ("a", 0, 2), ("a", 1, 2), ("a", 0, 4), ("a", 1, 4),
    ]  # fmt: skip
    assert outcomes(events) == {"a": "done", "b": "done"}


def test_decoding_takes_about_as_much_time_as_steps():
    """A step takes 0.03 s, an image 0.05 s: running jobs never wait for two images in a row."""
    runner = CountingRunner((12,))
    engine, events = engine_on(runner)
    engine.submit(make_job("many", steps=1, guidance_scale=1.0, n=10))
    engine.submit(make_job("long", steps=40))
    times: list[float] = []
    while engine.busy:
        engine.tick()
        times.append(runner.clock())
    assert max(b - a for a, b in pairwise(times)) < 0.15 + 2 * 0.05
    assert events.index(of(events, Done)[0]) < events.index(of(events, Stepped)[30])


def test_models_that_do_not_fit_together_take_turns_and_no_job_starves():
    runner = CountingRunner((4,), fits_models=1)
    engine, events = engine_on(runner)
    engine.submit(make_job("first", model="m", steps=50))
    engine.tick()
    engine.submit(make_job("other", model="k", steps=5))
    for i in range(2000):
        if "other" in outcomes(events):
            break
        engine.submit(make_job(f"more {i}", model="m", steps=50))  # without end
        for _ in range(5):
            engine.tick()
    assert outcomes(events)["other"] == "done"
    while engine.busy:
        engine.tick()
    assert set(outcomes(events).values()) == {"done"}


class SmallDevice(CountingRunner):
    """Runs out of memory when a second model is loaded, and always for model "huge"."""

    def load(self, job: Job, busy: Collection[ModelKey]) -> bool:
        if job.model == "huge" or (self.loaded and job.model not in self.loaded):
            raise OutOfMemory
        return super().load(job, busy)


def test_a_model_that_does_not_fit_takes_the_place_of_idle_ones():
    runner = SmallDevice()
    engine, events = engine_on(runner)
    for model in ("m", "k", "m"):
        engine.submit(make_job(f"{model} {len(events)}", model=model))
        while engine.busy:
            engine.tick()
    assert set(outcomes(events).values()) == {"done"}
    assert of(events, Incident) == [Incident("out_of_memory", "load")] * 2


def test_a_model_that_does_not_fit_waits_for_busy_ones():
    runner = SmallDevice()
    engine, events = engine_on(runner)
    engine.submit(make_job("first", model="m", steps=20))
    engine.tick()
    engine.submit(make_job("second", model="k"))
    while engine.busy:
        engine.tick()
    assert [event.job for event in of(events, Done)] == ["first", "second"]
    assert len(of(events, Incident)) == 3, "it is not tried again at every step"


def test_a_model_that_does_not_even_fit_alone_fails_its_own_job_only():
    runner = SmallDevice()
    engine, events = engine_on(runner)
    engine.submit(make_job("good", model="m", steps=20))
    engine.tick()
    engine.submit(make_job("bad", model="huge"))
    engine.submit(make_job("later", model="m"))
    while engine.busy:
        engine.tick()
    assert outcomes(events) == {"good": "done", "later": "done", "bad": "out_of_memory"}


jobs = st.builds(
    dict,
    model=st.sampled_from("mk"),
    steps=st.integers(1, 6),
    n=st.integers(1, 4),
    guidance_scale=st.sampled_from([0.0, 1.0, 4.0]),
    width=st.sampled_from([8, 16]),
    sampler=st.sampled_from(["ddim", "interval", "two_phases"]),
    priority=st.integers(0, 2),
    preview_every=st.integers(0, 2),
    prompt=st.sampled_from(
        ["fine"] * 10
        + ["shape", "load", "start", "step", "prepare", "finish", "preview", "oom", "broken", "wobbly"]
    ),
)
moves = st.lists(
    st.one_of(jobs, jobs, st.integers(0, 20), st.none(), st.none(), st.floats(0.01, 1), st.just("crash")),
    max_size=40,
)  # submit, cancel, tick, submit with a deadline, crash
FINE = ("fine", "preview", "wobbly")
CODES = {"oom": "out_of_memory", "broken": "non_finite", "finish": "non_finite"}


class History:
    """Engines one after the other, as a supervisor runs them, and all their events."""

    def __init__(self, buckets: Sequence[int], fits_rows: int, fits_models: int, measures: bool) -> None:
        self.setting = buckets, fits_rows, fits_models, measures
        self.clock = Clock()
        self.jobs: dict[str, Job] = {}
        self.deadlines: dict[str, float] = {}
        self.ends: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """A new engine gets every job that has no end."""
        buckets, fits_rows, fits_models, measures = self.setting
        self.runner = CountingRunner(buckets, self.clock, fits_rows, fits_models)
        self.runner.measures = measures
        self.engine, self.events = engine_on(self.runner, decode_chunk=2)
        for job in self.jobs.values():
            if not self.ends[job.id]:
                self.engine.submit(job)

    def crash(self) -> None:
        self.check()
        self.begin()

    def submit(self, fields: dict, patience: float = 1e9) -> None:
        job = make_job(str(len(self.jobs)), **fields)
        self.jobs[job.id] = job
        self.deadlines[job.id] = self.clock() + patience
        self.engine.submit(job)

    def tick(self) -> None:
        for job, deadline in self.deadlines.items():
            if self.clock() > deadline:
                self.engine.cancel(job)
        self.engine.tick()

    def check(self) -> None:
        """Check the order of the current engine's events for each job, and count its end."""
        for job in self.jobs.values():
            mine = [event for event in self.events if concerns(event, job.id)]
            names = [type(event).__name__ for event in mine]
            waiting = [i for i, name in enumerate(names) if name == "QueuePositions"]
            started = [i for i, name in enumerate(names) if name == "Started"]
            worked = [i for i, name in enumerate(names) if name in ("Stepped", "Previewed")]
            ended = [i for i, name in enumerate(names) if name in ("Done", "Failed", "Cancelled")]
            assert len(started) <= 1
            assert len(ended) <= 1
            assert waiting + started + worked + ended == list(range(len(mine))), names
            steps = [
                part.steps
                for event in mine
                if isinstance(event, Stepped)
                for part in event.jobs
                if part.job == job.id
            ]
            assert steps == sorted(steps)
            shown = [(event.index, event.step) for event in mine if isinstance(event, Previewed)]
            assert len(set(shown)) == len(shown)
            self.ends[job.id] += len(ended)
            assert self.ends[job.id] <= 1
            self.check_end(job, mine)

    def check_end(self, job: Job, mine: list) -> None:
        if isinstance(end := mine[-1] if mine else None, Done):
            assert job.prompt in (*FINE, "prepare")
            assert end.images == tuple(b"%d" % (job.seed + i) for i in range(job.n))
        elif isinstance(end, Failed):
            assert job.prompt not in FINE
            assert end.code == CODES.get(job.prompt, "job_failed")


def concerns(event, job: str) -> bool:
    if isinstance(event, Decoded | Incident | Overflowed):
        return False
    if isinstance(event, QueuePositions):
        return any(name == job for name, _, _ in event.positions)
    return any(part.job == job for part in event.jobs) if isinstance(event, Stepped) else event.job == job


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(
    moves=moves,
    buckets=st.sampled_from([(2,), (2, 4, 8), (3, 9)]),
    fits_rows=st.integers(1, 9),
    fits_models=st.integers(1, 2),
    measures=st.booleans(),
)
def test_every_job_ends_exactly_once(moves, buckets, fits_rows, fits_models, measures):
    history = History(buckets, fits_rows, fits_models, measures)
    for move in moves:
        if isinstance(move, dict):
            history.submit(move)
        elif move == "crash":
            history.crash()
        elif isinstance(move, int):
            history.engine.cancel(str(move))
        elif isinstance(move, float):
            history.submit({"steps": 6, "prompt": "fine"}, patience=move)
        else:
            history.tick()
    for _ in range(5000):
        if not history.engine.busy:
            break
        history.tick()
    history.check()
    assert all(history.ends[job] == 1 for job in history.jobs)
    engine, runner = history.engine, history.runner
    left = (engine.jobs, engine.pending, engine.busy_models, engine.undecoded, engine.scheduler)
    assert not any(map(len, (*left, runner.started, runner.full_precision)))
    most = max(buckets[-1], 2)
    assert all(event.rows <= most for event in history.events if isinstance(event, Stepped))


class SlowRunner(CountingRunner):
    """Each row of a call takes a fifth of a second."""

    def step(self, keys: Sequence[ImageKey]) -> Call:
        call = super().step(keys)
        self.clock.now += 0.2 * call.rows
        return call


def test_calls_of_slow_rows_have_fewer_rows():
    runner = SlowRunner((2, 4, 8, 16))
    engine, events = engine_on(runner)
    engine.submit(make_job("a", n=16, steps=6))
    while engine.busy:
        engine.tick()
    rows = [event.padded for event in of(events, Stepped)]
    assert max(rows[2:]) == 4  # the first call does not count, the second shows the speed
    assert outcomes(events) == {"a": "done"}


def test_a_small_job_is_decoded_before_a_large_one_is_finished():
    engine, events = engine_on(CountingRunner((32,)), decode_chunk=1)
    engine.submit(make_job("large", n=14, steps=1, guidance_scale=1.0))
    engine.submit(make_job("small", n=1, steps=1, guidance_scale=1.0))
    while engine.busy:
        engine.tick()
    ends = [event for event in events if isinstance(event, Decoded | Done)]
    assert [event.job for event in ends if isinstance(event, Done)] == ["small", "large"]
    assert next(index for index, event in enumerate(ends) if isinstance(event, Done)) <= 2


@pytest.mark.parametrize("images", [1, 4])
def test_a_client_that_floods_the_decoder_leaves_another_its_part(images):
    """Jobs of one step, whose decoding takes longer than their UNet calls. A always has 16, B has one."""
    engine, events = engine_on(CountingRunner((32,)), decode_chunk=1)
    numbers = count()

    def submit(client: str, n: int) -> None:
        name = f"{client}{next(numbers)}"
        engine.submit(make_job(name, client=client, n=n, steps=1, guidance_scale=1.0))

    for _ in range(16):
        submit("A", images)
    submit("B", 1)
    decoded: Counter[str] = Counter()
    while decoded.total() < 200:
        engine.tick()
        ended, events[:] = of(events, Done), []
        for end in ended:
            client = end.job[0]
            decoded[client] += len(end.images)
            submit(client, len(end.images))
    assert decoded["B"] / decoded.total() > 0.3

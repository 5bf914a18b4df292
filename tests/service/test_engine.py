"""The loop, on a runner that counts instead of drawing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from service.engine import Engine
from service.errors import NonFinite
from service.job import Cancelled, Done, Failed, ImageKey, Job, Shape, Stepped


def make_job(name: str, **changes) -> Job:
    fields = {
        "model": "m", "prompt": "p", "negative_prompt": "", "width": 8, "height": 8, "steps": 3,
        "guidance_scale": 3.0, "seed": 0, "n": 1, "sampler": "ddim", "eta": 0.0,
    }  # fmt: skip
    return Job(id=name, **(fields | changes))


class CountingRunner:
    """Counts steps; a prompt says where its job breaks."""

    def __init__(self) -> None:
        self.steps: Counter[ImageKey] = Counter()
        self.held: dict[str, Job] = {}

    def shape(self, job: Job) -> Shape:
        self.break_at("shape", job)
        return Shape((job.width,), job.steps, 1.0)

    def start(self, job: Job) -> tuple[str, ...]:
        self.break_at("start", job)
        self.held[job.id] = job
        return ()

    def step(self, keys: Sequence[ImageKey]) -> int:
        for key in keys:
            self.break_at("step", self.held[key.job])
        assert len({self.held[key.job].width for key in keys}) == 1
        self.steps.update(keys)
        return sum(self.held[key.job].rows for key in keys)

    def finish(self, key: ImageKey) -> bytes:
        self.break_at("finish", self.held[key.job])
        assert self.steps[key] == self.held[key.job].steps
        return b"%d" % (self.held[key.job].seed + key.index)

    def discard(self, job: str) -> None:
        self.held.pop(job, None)

    def break_at(self, where: str, job: Job) -> None:
        if job.prompt == where:
            raise NonFinite if where == "finish" else RuntimeError("as asked")


def run(jobs: Sequence[Job], max_rows: int = 8) -> tuple[list, CountingRunner]:
    events: list = []
    runner = CountingRunner()
    engine = Engine(runner, events.append, max_rows, decode_chunk=2)
    for job in jobs:
        engine.submit(job)
    while engine.busy:
        engine.tick()
    return events, runner


def test_images_come_back_in_the_order_of_their_seeds():
    events, _ = run([make_job("a", n=5, seed=7)], max_rows=4)
    assert events[-1].pictures == (b"7", b"8", b"9", b"10", b"11")


def test_jobs_of_different_steps_share_calls():
    events, _ = run(
        [make_job("a", steps=10), make_job("b", steps=3), make_job("c", steps=7, guidance_scale=1.0)]
    )
    rows = [event.rows for event in events if isinstance(event, Stepped)]
    assert rows == [5] * 3 + [3] * 4 + [2] * 3


def test_one_bad_job_fails_alone():
    events, _ = run([make_job("good"), make_job("bad", prompt="step"), make_job("too")])
    assert {event.job for event in events if isinstance(event, Done)} == {"good", "too"}
    assert [event for event in events if isinstance(event, Failed)] == [Failed("bad", "job_failed")]


def test_a_picture_of_non_finite_numbers_is_an_error():
    events, _ = run([make_job("a", prompt="finish")])
    assert events[-1] == Failed("a", "non_finite")


def test_a_cancelled_job_is_out_of_the_next_call():
    events: list = []
    engine = Engine(CountingRunner(), events.append, 8, 2)
    engine.submit(make_job("a", steps=100))
    engine.submit(make_job("b", steps=100))
    engine.tick()
    engine.cancel("a")
    engine.tick()
    assert [event.rows for event in events if isinstance(event, Stepped)] == [4, 2]
    assert Cancelled("a") in events


jobs = st.builds(
    dict,
    steps=st.integers(1, 6),
    n=st.integers(1, 4),
    guidance_scale=st.sampled_from([0.0, 1.0, 4.0]),
    width=st.sampled_from([8, 16]),
    priority=st.integers(0, 2),
    prompt=st.sampled_from(["fine"] * 6 + ["shape", "start", "step", "finish"]),
)
moves = st.lists(st.one_of(jobs, st.integers(0, 20), st.none()), max_size=40)  # submit, cancel, tick


@given(moves=moves, max_rows=st.integers(2, 9))
def test_every_job_ends_exactly_once(moves, max_rows):
    events: list = []
    runner = CountingRunner()
    engine = Engine(runner, events.append, max_rows, decode_chunk=2)
    submitted: dict[str, dict] = {}
    for move in moves:
        if isinstance(move, dict):
            name = str(len(submitted))
            submitted[name] = move
            engine.submit(make_job(name, **move))
        elif isinstance(move, int):
            engine.cancel(str(move))
        else:
            engine.tick()
    while engine.busy:
        engine.tick()
    ends = [event for event in events if isinstance(event, Done | Failed | Cancelled)]
    assert sorted(event.job for event in ends) == sorted(submitted)
    assert all(submitted[event.job]["prompt"] == "fine" for event in ends if isinstance(event, Done))
    assert not runner.held
    assert not len(engine.scheduler)
    assert all(event.rows <= max_rows for event in events if isinstance(event, Stepped))

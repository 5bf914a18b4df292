"""The state of a job, for those who follow it."""

from __future__ import annotations

from service.engine.events import Previewed
from service.worker.progress import Progress, State


def preview(step: int, index: int = 0) -> Previewed:
    return Previewed("a", index, step, 1, 1, b"rgb")


def test_a_job_waits_then_runs_then_ends():
    progress = Progress()
    progress.wait_at(2, 7.5)
    assert progress.state == State("queued", 2, 7.5)
    progress.start(5)
    progress.advance(3)
    assert progress.state == State("running", None, None, 3, 5)
    progress.end("done")
    assert progress.state == State("done", None, None, 3, 5)


def test_a_job_that_runs_again_repeats_nothing():
    progress = Progress()
    progress.start(5)
    progress.advance(3)
    progress.show(preview(3))
    before = progress.state
    progress.wait_at(1, None)
    progress.start(5)
    progress.advance(2)
    progress.show(preview(2))
    assert progress.state is before
    progress.show(preview(1, index=1))
    assert progress.state.preview == preview(1, index=1), "another image"


def test_the_first_end_counts():
    progress = Progress()
    progress.end("cancelled")
    progress.end("done")
    progress.advance(1)
    assert progress.state == State("cancelled")

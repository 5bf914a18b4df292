"""Loading and unloading models on demand, beside jobs."""

from __future__ import annotations

from service.engine.events import CallEnded, Done
from tests.helpers.fake_runner import CountingRunner, engine_on, make_job, of, outcomes


def codes(events: list) -> dict[str, str | None]:
    """Call -> its error code."""
    return {event.call: event.code for event in of(events, CallEnded)}


def test_a_model_is_loaded_and_unloaded_without_jobs():
    runner = CountingRunner()
    engine, events = engine_on(runner)
    engine.set_loaded("1", "m", load=True)
    engine.tick()
    assert runner.loaded == ["m"]
    engine.set_loaded("2", "m", load=False)
    assert engine.busy
    engine.tick()
    assert runner.loaded == []
    assert codes(events) == {"1": None, "2": None}
    assert not engine.busy


def test_unloading_waits_for_the_jobs_of_the_model_alone():
    runner = CountingRunner()
    engine, events = engine_on(runner)
    engine.submit(make_job("a", steps=5))
    engine.submit(make_job("b", steps=50, model="other"))
    engine.tick()
    engine.set_loaded("1", "m", load=False)
    while not codes(events):
        assert "m" in runner.loaded
        engine.tick()
    assert outcomes(events) == {"a": "done"}
    assert runner.loaded == ["other"]


def test_unloading_waits_for_jobs_that_are_only_queued():
    runner = CountingRunner(fits_models=1)
    engine, events = engine_on(runner)
    engine.submit(make_job("a"))
    engine.tick()
    engine.submit(make_job("b", model="other"))
    engine.set_loaded("1", "other", load=False)
    while engine.busy:
        engine.tick()
    assert [type(event) for event in events if isinstance(event, Done | CallEnded)] == [Done, Done, CallEnded]


def test_loading_waits_until_busy_models_leave_room():
    runner = CountingRunner(fits_models=1)
    engine, events = engine_on(runner)
    engine.submit(make_job("a"))
    engine.tick()
    engine.set_loaded("1", "other", load=True)
    while engine.busy:
        engine.tick()
    assert outcomes(events) == {"a": "done"}
    assert codes(events) == {"1": None}
    assert runner.loaded == ["other"]


def test_a_failure_to_load_is_the_answer_and_ends_nothing_else(monkeypatch):
    runner = CountingRunner()
    engine, events = engine_on(runner)
    monkeypatch.setattr(runner, "load_models", lambda keys, busy: 1 / 0)
    engine.submit(make_job("a"))
    engine.set_loaded("1", "other", load=True)
    while engine.busy:
        engine.tick()
    assert codes(events) == {"1": "job_failed"}
    assert outcomes(events) == {"a": "done"}


def test_a_call_whose_client_has_left_is_forgotten():
    engine, events = engine_on(CountingRunner())
    engine.submit(make_job("a"))
    engine.set_loaded("1", "m", load=False)
    engine.cancel("1")
    while engine.busy:
        engine.tick()
    assert codes(events) == {}
    assert engine.runner.loaded == ["m"]


def test_models_that_are_not_listed_any_more_are_unloaded_after_their_jobs():
    runner = CountingRunner()
    engine, events = engine_on(runner)
    engine.submit(make_job("a", steps=5))
    engine.tick()
    engine.install(["m"])
    while engine.busy:
        engine.tick()
    assert outcomes(events) == {"a": "done"}
    assert runner.loaded == []
    assert codes(events) == {}

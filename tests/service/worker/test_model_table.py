"""What the API process knows about the models of several workers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace

import pytest

from service.catalogue import Ignored
from service.engine.events import CallEnded, LoadedModel, LoadedModels
from service.errors import ModelUnreadable, Unavailable
from service.settings import Settings
from service.worker.model_table import ModelTable
from service.worker.protocol import Offer
from tests.checkpoints.tiny import tiny_spec


def offer(number: int, *names: str) -> Offer:
    specs = tuple(replace(tiny_spec(), name=name) for name in names)
    return Offer(number, specs, (Ignored("x", f"in {number}"),))


def run(scenario: Coroutine) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_requests_see_a_catalogue_once_every_worker_serves_it():
    table = ModelTable(Settings())
    assert not table.known
    table.take(0, offer(0, "a"))
    table.take(1, offer(0, "a"))
    table.take(0, offer(1, "a", "b"))
    assert list(table.specs) == ["a"]
    table.take(1, offer(1, "a", "b"))
    assert list(table.specs) == ["a", "b"]
    assert table.ignored == (Ignored("x", "in 1"),)


def test_a_worker_that_has_ended_holds_nothing_up():
    table = ModelTable(Settings())
    table.take(0, offer(0, "a"))
    table.take(1, offer(1, "a", "b"))
    table.set_loaded(0, LoadedModels((LoadedModel("a", 7, "float16", "torch"),)))
    assert table.loaded("a") == LoadedModel("a", 7, "float16", "torch")
    table.lose(0)
    assert list(table.specs) == ["a", "b"]
    assert table.loaded("a") is None
    table.lose(1)
    assert list(table.specs) == ["a", "b"]  # until another worker is ready


def test_a_rescan_waits_for_every_worker():
    async def scenario() -> None:
        table = ModelTable(Settings())
        waiting = asyncio.create_task(table.wait_for(1))
        for worker, number in ((0, 0), (1, 1), (0, 1)):
            await asyncio.sleep(0)
            assert not waiting.done()
            table.take(worker, offer(number, "a"))
        await waiting

    run(scenario())


def test_a_call_ends_with_the_answer_of_every_worker():
    async def scenario() -> None:
        table = ModelTable(Settings())
        first, second, third = table.begin_call("1", "m", [0, 1, 2])
        table.end_call(0, CallEnded("1", None))
        table.end_call(1, CallEnded("1", "model_unreadable"))
        table.lose(2)
        assert await first is None
        with pytest.raises(ModelUnreadable, match="'m'"):
            await second
        with pytest.raises(Unavailable):
            await third
        table.forget_call("1")
        table.end_call(0, CallEnded("1", None))  # too late: ignored

    run(scenario())

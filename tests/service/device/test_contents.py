"""A registry whose models and LoRAs are replaced while it holds some of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from models.formats.identify import Source, identify
from service.catalogue import Entry
from service.device.contents import Contents
from service.device.registry import Registry
from service.engine.job import LoraWeights, ModelKey

A = ModelKey("a")
INKED = ModelKey("a", (LoraWeights("ink", 1.0, 1.0),))


@pytest.fixture(scope="module")
def source(tiny: Path) -> Source:
    return identify(tiny)


def contents(source: Source, *names: str, ink: str = "1") -> Contents:
    """Contents with new files of these names."""
    sources = {name: replace(source, notes=(name,)) for name in names}
    specs = {name: replace(source.spec, name=name) for name in names}
    return Contents(0, sources, specs, {"ink": Entry("lora", "ink", "ink", "ink", ink)})


class Loads:
    """Counts the loads of a registry; a bundle is the number of its load."""

    def __init__(self, first: Contents) -> None:
        self.count = 0
        self.registry: Registry[int] = Registry({}, self.load, lambda spec: 10)
        self.registry.offer(lambda spec, names: [0 for _ in names], lambda base, loras: self.load(), sum, 4)
        self.registry.install(first)

    def load(self, source: Source | None = None) -> int:
        self.count += 1
        return self.count


def test_unchanged_files_stay_loaded(source):
    first = contents(source, "a", "b")
    registry = Loads(first).registry
    registry.make_ready(INKED, ())
    assert registry.install(replace(first, number=1)) == ()
    assert registry.is_ready(INKED)
    assert list(registry) == ["a", "b"]


def test_a_changed_file_is_loaded_again_when_no_job_uses_the_old_one(source):
    loads = Loads(contents(source, "a"))
    registry = loads.registry
    registry.make_ready(A, ())
    assert registry.install(contents(source, "a")) == ("a",)
    assert not registry.is_ready(A)
    assert registry.bundle(A) == 1  # for the jobs that were admitted with it
    assert not registry.make_ready(A, busy=[A])
    assert registry.make_ready(A, ())
    assert registry.bundle(A) == 2


def test_a_model_that_is_not_listed_any_more_still_runs_its_jobs(source):
    registry = Loads(contents(source, "a", "b")).registry
    registry.make_ready(A, ())
    assert registry.install(contents(source, "b")) == ("a",)
    assert registry.is_ready(A)
    assert registry.specs["a"].name == "a"
    assert list(registry) == ["b"]
    registry.unload("a")
    assert registry.loaded() == {}


def test_a_changed_lora_is_merged_again_when_no_job_uses_the_old_one(source):
    first = contents(source, "a")
    registry = Loads(first).registry
    registry.make_ready(INKED, ())
    registry.install(replace(first, loras=contents(source, ink="2").loras))
    assert registry.is_ready(A)
    assert not registry.is_ready(INKED)
    assert not registry.make_ready(INKED, busy=[INKED])
    assert registry.make_ready(INKED, busy=[A])
    assert registry.bundle(INKED) == 3


def test_every_change_of_what_is_loaded_is_reported(source):
    registry, reports = Loads(contents(source, "a", "b")).registry, []
    registry.on_change = lambda: reports.append({name: size for name, (_, size) in registry.loaded().items()})
    registry.load("a")
    registry.load("b", busy=["a"])
    registry.unload("a")
    registry.unload("a")
    assert reports == [{"a": 10}, {"a": 10, "b": 10}, {"b": 10}]

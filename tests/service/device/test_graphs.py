"""When calls are recorded and replayed, shown on a CPU by a recorder whose replay repeats the call.

How CUDA captures a graph is not tested here.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models.checkpoint import load
from service.device.graphs import Function, Graphs, Inputs, graphs_on
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.device.tensor_tree import map_tensors, tensors_of
from service.engine.job import ImageKey
from tests.helpers.torch_runner import begin, made, tiny_job


class Tapes:
    """A recorder that counts recordings and replays. As in a graph, inputs and output have fixed memory."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Function, inputs: Inputs) -> Tape:
        self.recorded += 1
        given = map_tensors(Tensor.clone, inputs)
        return Tape(self, function, given, function(*given))


@dataclass
class Tape:
    tapes: Tapes
    function: Function
    given: Inputs
    out: Tensor

    def replay(self, inputs: Inputs) -> Tensor:
        self.tapes.replayed += 1
        for to, x in zip(tensors_of(self.given), tensors_of(inputs), strict=True):
            to.copy_(x)
        self.out.copy_(self.function(*self.given))
        return self.out.clone()


def double(x: Tensor, y: Tensor | None = None) -> Tensor:
    return 2 * x if y is None else 2 * x + y


def test_the_first_call_runs_directly_and_later_ones_are_replayed():
    tapes, network = Tapes(), nn.Identity()
    graphs = Graphs(tapes)
    xs = [torch.full((2, 3), float(i)) for i in range(4)]
    outs = [graphs.run(network, double, x, None) for x in xs]
    assert all(torch.equal(out, 2 * x) for out, x in zip(outs, xs, strict=True))
    assert (tapes.recorded, tapes.replayed) == (1, 3)


def test_each_shape_dtype_set_of_inputs_and_network_has_its_own_recording():
    tapes, networks = Tapes(), [nn.Identity(), nn.Identity()]
    graphs, x = Graphs(tapes), torch.ones(2, 3)
    kinds = [(x, None), (x, x), (x[:1], None), (x.half(), None)]
    for _ in range(3):
        for network in networks:
            for kind in kinds:
                assert torch.equal(graphs.run(network, double, *kind), double(*kind))
    assert (tapes.recorded, tapes.replayed) == (8, 16)


class Nested(NamedTuple):
    xs: tuple[Tensor, ...]
    y: Tensor | None


def test_nested_inputs_are_copied_and_told_apart_by_their_shapes():
    tapes, network = Tapes(), nn.Identity()
    graphs = Graphs(tapes)

    def add(nested: Nested) -> Tensor:
        return sum(nested.xs, torch.zeros(3)) + (0 if nested.y is None else nested.y)

    for value in (1.0, 2.0, 3.0):
        x = torch.full((3,), value)
        assert torch.equal(graphs.run(network, add, Nested((x, x), None)), 2 * x)
        assert torch.equal(graphs.run(network, add, Nested((x,), x)), 2 * x)
    assert (tapes.recorded, tapes.replayed) == (2, 4)


def test_the_least_recently_used_recording_is_dropped():
    tapes, network = Tapes(), nn.Identity()
    graphs = Graphs(tapes, max_graphs=2)

    def call(rows: int) -> None:
        graphs.run(network, double, torch.ones(rows))

    for rows in (1, 1, 2, 2, 1, 3, 3):  # 3 replaces 2
        call(rows)
    assert tapes.recorded == 3
    call(1)
    assert tapes.recorded == 3
    call(2), call(2)
    assert tapes.recorded == 4


def test_a_call_that_cannot_be_recorded_runs_directly_and_is_tried_once(caplog):
    tries = []

    def record(function: Function, inputs: Inputs):
        tries.append(inputs)
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, network, x = Graphs(record), nn.Identity(), torch.ones(2)
    assert all(torch.equal(graphs.run(network, double, x), 2 * x) for _ in range(4))
    assert len(tries) == 1
    assert "cannot be captured" in caplog.text


@pytest.mark.slow
def test_an_unloaded_network_is_not_kept_alive_or_mistaken_for_a_new_one():
    class Light(Tapes):
        def __call__(self, function: Function, inputs: Inputs) -> Tape:
            tape = super().__call__(function, inputs)
            tape.function = double  # like a graph, it does not refer to the network
            return tape

    graphs, tapes = Graphs(tapes := Light()), tapes
    for _ in range(3):
        network = nn.Linear(3, 3)
        for _ in range(2):
            graphs.run(network, lambda x, network=network: network(x), torch.ones(2, 3))
        del network
        gc.collect()
    assert tapes.recorded == 3
    graphs.prune()
    assert not graphs._entries


def test_a_paused_call_is_not_replayed():
    tapes, network, x = Tapes(), nn.Identity(), torch.ones(2)
    graphs = Graphs(tapes)
    with graphs.paused():
        graphs.run(network, double, x)
        graphs.run(network, double, x)
    assert tapes.recorded == 0
    graphs.run(network, double, x)
    assert (tapes.recorded, tapes.replayed) == (1, 1)
    graphs.clear()
    graphs.run(network, double, x)
    assert (tapes.recorded, tapes.replayed) == (1, 1)


def test_a_cpu_records_nothing():
    graphs, network = graphs_on(torch.device("cpu")), nn.Identity()
    for _ in range(3):
        graphs.run(network, double, torch.ones(2))
    assert not graphs._entries


@pytest.mark.parametrize("broken", [False, True])
def test_images_are_the_same_with_and_without_recordings(tiny: Path, broken):
    runner = TorchRunner(Registry({"m": tiny}, load), buckets=(2, 4))
    job = tiny_job(n=2, eta=1.0)
    begin(runner, job)
    expected = made(runner, job)
    tapes = Tapes()

    def record(function: Function, inputs: Inputs):
        if broken:
            raise RuntimeError
        return tapes(function, inputs)

    runner.graphs = Graphs(record)
    for _ in range(2):
        begin(runner, job)
        assert made(runner, job) == expected
    assert bool(tapes.replayed) != broken
    assert runner.jobs["a"].images[ImageKey("a", 0).image].done == 3

"""When calls are recorded and replayed, shown on a CPU by a recorder whose replay repeats the call.

How CUDA graphs are captured: test_cuda_graphs.py.
"""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models.checkpoint import load
from service.device.cuda_graphs import graphs_on
from service.device.graphs import Function, Graphs, Inputs
from service.device.registry import Registry
from service.device.runner import TorchRunner
from service.device.tensor_tree import map_tensors, tensors_of
from service.engine.graph_counts import GraphCounts
from service.engine.job import ImageKey
from service.errors import CaptureFailed
from tests.helpers.torch_runner import begin, made, tiny_job


class Tapes:
    """A recorder that counts recordings and replays. As in a graph, inputs and output have fixed memory.

    size: bytes of each recording.
    """

    def __init__(self, size: int = 1) -> None:
        self.recorded = self.replayed = 0
        self.size = size

    def __call__(self, function: Function, inputs: Inputs) -> Tape:
        self.recorded += 1
        given = map_tensors(Tensor.clone, inputs)
        return Tape(self, function, given, function(*given))


@dataclass
class Tape:
    tapes: Tapes
    function: Function
    given: Inputs
    out: Any  # a tensor, or a tuple of tensors

    @property
    def size(self) -> int:
        return self.tapes.size

    def replay(self, inputs: Inputs) -> Any:
        self.tapes.replayed += 1
        for to, x in zip(tensors_of(self.given), tensors_of(inputs), strict=True):
            to.copy_(x)
        for to, x in zip(tensors_of(self.out), tensors_of(self.function(*self.given)), strict=True):
            to.copy_(x)
        return map_tensors(Tensor.clone, self.out)


def double(x: Tensor, y: Tensor | None = None) -> Tensor:
    return 2 * x if y is None else 2 * x + y


def graphs_with(record, **options) -> Graphs:
    """Graphs that record the second call of a kind."""
    return Graphs(record, **({"record_at": 2} | options))


def test_the_first_calls_run_directly_and_later_ones_are_replayed():
    tapes, network = Tapes(), nn.Identity()
    graphs = Graphs(tapes, record_at=3)
    xs = [torch.full((2, 3), float(i)) for i in range(5)]
    outs = [graphs.run(network, double, x, None) for x in xs]
    assert all(torch.equal(out, 2 * x) for out, x in zip(outs, xs, strict=True))
    assert (tapes.recorded, tapes.replayed) == (1, 3)


def test_each_shape_dtype_set_of_inputs_network_and_function_has_its_own_recording():
    tapes, networks = Tapes(), [nn.Identity(), nn.Identity()]
    graphs, x = graphs_with(tapes), torch.ones(2, 3)

    def add_one(x: Tensor, y: Tensor | None = None) -> Tensor:
        return double(x, y) + 1

    kinds = [(x, None), (x, x), (x[:1], None), (x.half(), None)]
    for _ in range(3):
        for network in networks:
            for kind in kinds:
                for function in (double, add_one):
                    assert torch.equal(graphs.run(network, function, *kind), function(*kind))
    assert (tapes.recorded, tapes.replayed) == (16, 32)


def test_first_calls_and_recorded_calls_are_counted_as_slow():
    graphs, network, x = Graphs(Tapes(), record_at=3), nn.Identity(), torch.ones(2)
    slow = []
    for _ in range(5):
        graphs.run(network, double, x)
        slow.append(graphs.slow_calls)
    assert slow == [1, 1, 2, 2, 2]


def test_calls_and_recordings_are_counted_for_the_metrics():
    tapes, network = Tapes(size=10), nn.Identity()
    graphs = graphs_with(tapes, max_bytes=10, idle_calls=2)
    for rows in (1, 1, 1, 2, 2, 2):
        graphs.run(network, double, torch.ones(rows))
    assert graphs.counts == GraphCounts(direct=2, replayed=4, recorded=2, failed=0, dropped=1, bytes=10)
    graphs.clear()
    assert graphs.counts == GraphCounts(direct=2, replayed=4, recorded=2, failed=0, dropped=2, bytes=0)


class Nested(NamedTuple):
    xs: tuple[Tensor, ...]
    y: Tensor | None


def test_nested_inputs_are_copied_and_told_apart_by_their_shapes():
    tapes, network = Tapes(), nn.Identity()
    graphs = graphs_with(tapes)

    def add(nested: Nested) -> Tensor:
        return sum(nested.xs, torch.zeros(3)) + (0 if nested.y is None else nested.y)

    for value in (1.0, 2.0, 3.0):
        x = torch.full((3,), value)
        assert torch.equal(graphs.run(network, add, Nested((x, x), None)), 2 * x)
        assert torch.equal(graphs.run(network, add, Nested((x,), x)), 2 * x)
    assert (tapes.recorded, tapes.replayed) == (2, 4)


def test_recordings_that_were_not_used_for_long_make_room_for_others():
    tapes, network = Tapes(size=10), nn.Identity()
    graphs = graphs_with(tapes, max_bytes=20, idle_calls=4)

    def call(*rows: int) -> None:
        for count in rows:
            graphs.run(network, double, torch.ones(count))

    call(1, 1, 2, 2, 1, 3, 3)  # 1 and 2 were used lately: 3 runs directly
    assert tapes.recorded == 2
    call(1, 3)  # 2 was not used for 4 calls: 3 replaces it
    assert (tapes.recorded, graphs.size) == (3, 20)
    call(1, 3)
    assert tapes.recorded == 3
    call(2, 2)
    assert tapes.recorded == 3  # 1 and 3 were used lately


def test_many_kinds_in_turn_do_not_drop_each_others_recordings():
    tapes, network = Tapes(size=1), nn.Identity()
    graphs = Graphs(tapes, max_bytes=24)
    for _ in range(50):
        for rows in range(1, 31):
            graphs.run(network, double, torch.ones(rows))
    assert tapes.recorded == 24
    assert tapes.replayed == 24 * 48


def test_many_kinds_at_random_are_seldom_recorded():
    tapes, network, draw = Tapes(size=1), nn.Identity(), random.Random(0)
    graphs = Graphs(tapes, max_bytes=24)
    for _ in range(3000):
        graphs.run(network, double, torch.ones(draw.randint(1, 40)))
    assert tapes.recorded < 30
    assert tapes.replayed > 1500


def test_a_call_that_cannot_be_recorded_runs_directly_and_is_tried_once(caplog):
    tries = []

    def record(function: Function, inputs: Inputs):
        tries.append(inputs)
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, network, x = graphs_with(record), nn.Identity(), torch.ones(2)
    assert all(torch.equal(graphs.run(network, double, x), 2 * x) for _ in range(4))
    assert len(tries) == 1
    assert "cannot be recorded" in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA driver error: out of memory")]
)
def test_a_call_for_whose_recording_memory_ran_out_is_tried_again_later(error):
    tapes, network, x = Tapes(), nn.Identity(), torch.ones(2)
    tries = []

    def record(function: Function, inputs: Inputs):
        tries.append(inputs)
        if len(tries) == 1:
            raise error
        return tapes(function, inputs)

    graphs = graphs_with(record)
    assert all(torch.equal(graphs.run(network, double, x), 2 * x) for _ in range(7))
    assert len(tries) == 1
    assert torch.equal(graphs.run(network, double, x), 2 * x)
    assert (len(tries), tapes.replayed) == (2, 1)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: unspecified launch failure"), CaptureFailed("x")]
)
def test_a_device_that_is_lost_while_recording_is_not_hidden(error):
    def record(function: Function, inputs: Inputs):
        raise error

    graphs, network, x = graphs_with(record), nn.Identity(), torch.ones(2)
    graphs.run(network, double, x)
    with pytest.raises(type(error)):
        graphs.run(network, double, x)


@pytest.mark.slow
def test_an_unloaded_network_is_not_kept_alive_or_mistaken_for_a_new_one():
    class Light(Tapes):
        def __call__(self, function: Function, inputs: Inputs) -> Tape:
            tape = super().__call__(function, inputs)
            tape.function = double  # like a graph, it does not refer to the network
            return tape

    graphs = graphs_with(tapes := Light())
    for _ in range(3):
        network = nn.Linear(3, 3)
        for _ in range(2):
            graphs.run(network, lambda x, network=network: network(x), torch.ones(2, 3))
        del network
        gc.collect()
    assert tapes.recorded == 3
    graphs.prune()
    assert graphs.size == 0


def test_a_paused_call_is_not_replayed():
    tapes, network, x = Tapes(), nn.Identity(), torch.ones(2)
    graphs = graphs_with(tapes)
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
    assert graphs.slow_calls == 0


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

    runner.workspace.graphs = graphs_with(record)
    for _ in range(2):
        begin(runner, job)
        assert made(runner, job) == expected
    assert bool(tapes.replayed) != broken
    assert runner.jobs["a"].images[ImageKey("a", 0).image].done == 3

"""The capture of CUDA graphs, on a stand-in for torch.cuda that has torch's rules about pools and streams."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from service.device.cuda_graphs import CudaRecorder
from service.device.graphs import Graphs
from service.errors import CaptureFailed
from tests.helpers import fake_cuda
from tests.helpers.fake_cuda import GRAPH_BYTES, OPERATION_NOT_PERMITTED, FakeCuda

DEVICE = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return fake_cuda.install(monkeypatch)


def double(x: Tensor) -> Tensor:
    return 2 * x


def run(graphs: Graphs, network: nn.Module, rows: int = 1, times: int = 4, function=double) -> None:
    for _ in range(times):
        graphs.run(network, function, torch.ones(rows))


def failing(cuda: FakeCuda, error: Exception):
    """A function that works, except inside a capture."""

    def call(x: Tensor) -> Tensor:
        if cuda.captures_underway:
            raise error
        return 2 * x

    return call


def test_all_graphs_share_a_pool_and_their_memory_is_counted(cuda):
    graphs, network = Graphs(CudaRecorder(DEVICE)), nn.Identity()
    for rows in (1, 2, 3):
        run(graphs, network, rows)
    assert len(cuda.seen) == 1
    assert graphs.size == 3 * GRAPH_BYTES
    assert cuda.replays == 6
    assert cuda.current is cuda.default


@pytest.mark.parametrize("how", ["clear", "prune"])
def test_graphs_are_captured_again_after_the_last_one_is_gone(cuda, how, caplog):
    graphs, network = Graphs(CudaRecorder(DEVICE)), nn.Identity()
    run(graphs, network)
    if how == "clear":
        graphs.clear()
    else:
        network = nn.Identity()
        gc.collect()
        graphs.prune()
    gc.collect()
    run(graphs, network)
    assert len(cuda.seen) == 2
    assert cuda.replays == 4
    assert "cannot be recorded" not in caplog.text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("depends on a value")]
)
def test_an_error_in_a_capture_that_ends_well_leaves_the_device_usable(cuda, error):
    graphs, network = Graphs(CudaRecorder(DEVICE)), nn.Identity()
    run(graphs, network, function=failing(cuda, error))
    assert cuda.current is cuda.default
    assert not cuda.captures_underway
    run(graphs, network, rows=2)
    assert cuda.replays == 2


def test_a_capture_that_cannot_be_ended_is_a_lost_device(cuda):
    graphs, network = Graphs(CudaRecorder(DEVICE)), nn.Identity()
    cuda.fail_ends = 1
    with pytest.raises(CaptureFailed, match="not permitted when stream is capturing"):
        run(graphs, network, function=failing(cuda, RuntimeError(OPERATION_NOT_PERMITTED)))
    assert cuda.current is cuda.default


def test_a_capture_whose_end_alone_fails_is_a_lost_device_too(cuda):
    cuda.fail_ends = 1
    with pytest.raises(CaptureFailed, match="previous error during capture"):
        run(Graphs(CudaRecorder(DEVICE)), nn.Identity())
    assert cuda.current is cuda.default


def test_streams_are_made_once(cuda, monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append(fake_cuda.FakeStream()) or made[-1])
    graphs, network = Graphs(CudaRecorder(DEVICE)), nn.Identity()
    for rows in (1, 2, 3):
        run(graphs, network, rows)
    assert len(made) == 2

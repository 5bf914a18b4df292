"""Captures network calls as CUDA graphs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from service.device.graphs import Function, Graphs, Inputs
from service.device.tensor_tree import map_tensors, tensors_of
from service.errors import CaptureFailed

Pool = Any  # torch's handle of a memory pool

MEMORY_SHARE = 0.1  # of the device's memory, for all graphs
WARM_UPS = 2  # calls before a capture, in which libraries choose kernels and allocate workspaces


def graphs_on(device: torch.device) -> Graphs:
    """CUDA graphs on a CUDA device; elsewhere every call runs directly."""
    if device.type != "cuda":
        return Graphs()
    memory = torch.cuda.get_device_properties(device).total_memory
    return Graphs(CudaRecorder(device), int(MEMORY_SHARE * memory))


class CudaRecorder:
    """Captures CUDA graphs on one device, all in one memory pool.

    Graphs can share the pool because they never run at the same time, and each result is copied before
    another graph can overwrite it. torch refuses to capture into a pool whose last graph is gone, so such a
    pool is replaced.

    Warm-up calls run on another stream than captures: cuBLAS allocates a workspace per stream, and that of
    the capture stream must be allocated during a capture, hence inside the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._recordings: weakref.WeakSet[CudaRecording] = weakref.WeakSet()
        self._pool = torch.cuda.graph_pool_handle()
        self._warm_up_stream = torch.cuda.Stream()
        self._capture_stream = torch.cuda.Stream()

    def __call__(self, function: Function, inputs: Inputs) -> CudaRecording:
        """Capture a call. The function must neither wait for the device nor read tensor values.

        Raises CaptureFailed if torch's allocator is unusable after the attempt.
        """
        free_before, _ = torch.cuda.mem_get_info(self.device)
        static_inputs = map_tensors(Tensor.clone, inputs)
        current = torch.cuda.current_stream()
        self._warm_up_stream.wait_stream(current)
        with torch.cuda.stream(self._warm_up_stream):
            for _ in range(WARM_UPS):
                function(*static_inputs)
        current.wait_stream(self._warm_up_stream)
        if not self._recordings:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool, self._capture_stream):
            out = function(*static_inputs)
        free_after, _ = torch.cuda.mem_get_info(self.device)
        recording = CudaRecording(graph, static_inputs, out, max(free_before - free_after, 0))
        self._recordings.add(recording)
        return recording


@dataclass(frozen=True, eq=False)
class CudaRecording:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    out: Any
    size: int  # bytes of device memory that the capture took, the driver's included

    def replay(self, inputs: Inputs) -> Any:
        for target, x in zip(tensors_of(self.inputs), tensors_of(inputs), strict=True):
            target.copy_(x)
        self.graph.replay()
        return map_tensors(Tensor.clone, self.out)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Pool, stream: torch.cuda.Stream) -> Iterator[None]:
    """Capture the calls made inside this context.

    As torch.cuda.graph, but the current stream is restored after any failure, and a capture that cannot be
    ended raises CaptureFailed: torch's allocator then believes for ever that a capture is under way.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException as error:
            end_capture(graph, error)
            raise
        end_capture(graph)


def end_capture(graph: torch.cuda.CUDAGraph, cause: BaseException | None = None) -> None:
    """End a capture; `cause`: the error that ended it early. Raises CaptureFailed."""
    try:
        graph.capture_end()
    except RuntimeError as error:
        raise CaptureFailed(str(cause or error).splitlines()[0]) from error

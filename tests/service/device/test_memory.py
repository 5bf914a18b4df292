"""The memory that calls may take on a CUDA device, by a stand-in for torch's allocator."""

from __future__ import annotations

import pytest
import torch

from service.device.memory import CudaMemory
from service.engine.row_limits import MemoryUse


@pytest.fixture
def allocator(monkeypatch) -> dict[str, int]:
    numbers = {"max_memory_allocated": 700, "memory_allocated": 500, "memory_reserved": 900}
    for name in numbers:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: numbers[name])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    return numbers


@pytest.mark.parametrize(
    ("recorded", "room"), [(0, 1000 + 400), (300, 1000 + 100), (1000, 1000)], ids=["none", "some", "more"]
)
def test_memory_of_recorded_graphs_is_no_room_for_other_calls(allocator, recorded, room):
    memory = CudaMemory(torch.device("cuda"))
    memory.begin()
    assert memory.end(4, 0, recorded) == MemoryUse(rows=4, peak=200, room=room)

"""A device, and what all calls on it share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from service.device.graphs import Graphs
from service.device.memory import CudaMemory, HostMemory, free_cache
from service.engine.events import Incident


def ignore(incident: Incident) -> None:
    """Report nothing."""


@dataclass
class Workspace:
    """A device, its recorded calls and its memory.

    invariant: of TorchRunner. report_incident: is called with every failure, also those that are recovered.
    """

    device: torch.device
    graphs: Graphs
    memory: CudaMemory | HostMemory
    invariant: bool = False
    report_incident: Callable[[Incident], None] = ignore

    def free(self) -> None:
        """Free recorded calls and cached memory, which only make later calls faster."""
        self.graphs.clear()
        free_cache()

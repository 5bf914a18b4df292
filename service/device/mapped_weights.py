"""Weights of a network that is rarely called, in a file that is mapped into memory.

The kernel drops their pages when memory is short, and reads them again when the network runs.
"""

from __future__ import annotations

import mmap
import tempfile
from itertools import accumulate

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes


class MappedWeights:
    """Moves the parameters of networks to a temporary file, which is gone with them. Raises OSError."""

    def __init__(self, *networks: nn.Module) -> None:
        self._weights = list(dict.fromkeys(weight for network in networks for weight in network.parameters()))
        sizes = [-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in self._weights]
        starts = list(accumulate(sizes, initial=0))
        with tempfile.TemporaryFile() as file:
            for weight, start in zip(self._weights, starts, strict=False):
                file.seek(start)
                file.write(bytes_of(weight))
            file.truncate(starts[-1])
            file.flush()
            # Copy on write: changes of a weight do not reach the file.
            self._pages = mmap.mmap(file.fileno(), starts[-1], access=mmap.ACCESS_COPY)
        for weight, start in zip(self._weights, starts, strict=False):
            flat = torch.frombuffer(self._pages, dtype=weight.dtype, count=weight.numel(), offset=start)
            weight.data = flat.view(weight.shape)

    def release(self) -> None:
        """Free the memory of the pages; the next use reads the file, so changes of weights would be lost."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)

    def restore(self) -> None:
        """Move the weights from the file back to memory."""
        for weight in self._weights:
            weight.data = weight.data.clone()


def bytes_of(weight: Tensor) -> memoryview:
    return weight.detach().contiguous().flatten().view(torch.uint8).numpy().data

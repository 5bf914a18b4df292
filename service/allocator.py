"""How this process takes memory from the operating system and gives it back."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # parameters of glibc's mallopt(3)
LARGE_BYTES = 2**16


def return_freed_memory() -> bool:
    """Have glibc give back freed request bodies and images; False with other C libraries.

    By default each thread has a heap of its own, and large blocks go to heaps once some have been freed, so
    that a process grows for hours because of gaps that no block fits into. With this, all threads share one
    heap, and each block of LARGE_BYTES or more is mapped by itself. To be called before threads are started.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_ARENA_MAX, 1) and mallopt(M_MMAP_THRESHOLD, LARGE_BYTES))

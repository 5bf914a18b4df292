"""Copies of tensors between the CPU and a device."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """To the device, without waiting for its pending work; dtype: None for its own.

    A plain x.to(device) waits for all that is queued, unless x lies in pinned memory.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, dtype, non_blocking=True)


def download(x: Tensor) -> Tensor:
    """To the CPU; from a CUDA device through pinned memory, which is the fastest way."""
    if x.device.type != "cuda":
        return x.cpu()
    copy = start_download(x)
    torch.cuda.current_stream(x.device).synchronize()
    return copy


def start_download(x: Tensor) -> Tensor:
    """Start an asynchronous copy to pinned CPU memory; it is valid once the stream has reached this point.

    A tensor on the CPU is returned as it is.
    """
    if x.device.type != "cuda":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

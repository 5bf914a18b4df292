"""GroupNorm with SiLU, and GEGLU's product: torch's operators, or fused kernels on a GPU.

The plain functions define the result; the fused kernels read and write memory once. Triton is imported for
the first tensor on a GPU, never on a CPU.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

log = logging.getLogger(__name__)

TOLERANCE = 4e-3  # largest error of a kernel in float16, relative to the largest value of the plain function


def group_norm(x: Tensor, norm: nn.GroupNorm, activate: bool = False) -> Tensor:
    """GroupNorm of x (B, C, h, w), followed by SiLU if `activate`."""
    fused = fused_for(x)
    # torch's GroupNorm would return a contiguous tensor here, which the next convolution converts back.
    if fused and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        out: Tensor = fused.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, activate)
        return out
    return plain_group_norm(x, norm, activate)


def plain_group_norm(x: Tensor, norm: nn.GroupNorm, activate: bool) -> Tensor:
    normalised: Tensor = norm(x)
    return silu(normalised) if activate else normalised


def geglu(x: Tensor) -> Tensor:
    """The first half of x (..., 2 C), gated by the exact GELU of the other half -> (..., C)."""
    fused = fused_for(x)
    gated: Tensor = fused.geglu(x) if fused and x.is_contiguous() else plain_geglu(x)
    return gated


def plain_geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)


def fused_for(x: Tensor) -> ModuleType | None:
    """The fused kernels for a tensor; None on a CPU and where gradients are needed."""
    return fused_on(x.device) if x.is_cuda and not torch.is_grad_enabled() else None


@cache
def fused_on(device: torch.device) -> ModuleType | None:
    """The fused kernels, if they compile on this GPU and agree with the plain functions; else None.

    The first call must not be inside a captured graph: it compiles kernels and synchronizes with the device.
    """
    try:
        from models.networks import triton_kernels  # needs a C compiler at run time, which slim images lack

        error = largest_error(triton_kernels, device)
    except Exception:
        log.warning("fused kernels are off on %s: they cannot be built", device, exc_info=True)
        return None
    if not error <= TOLERANCE:
        log.warning("fused kernels are off on %s: their relative error is %.1e", device, error)
        return None
    return triton_kernels


def largest_error(fused: ModuleType, device: torch.device, dtype: torch.dtype = torch.float16) -> float:
    """The kernels' largest error against the plain functions in float32, relative to the largest value."""
    draw = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(4, 40, device=device)
    x = (
        torch.randn(2, 40, 9, 15, generator=draw)
        .to(device, dtype)
        .contiguous(memory_format=torch.channels_last)
    )
    y = torch.randn(3, 5, 2 * 24, generator=draw).to(device, dtype)
    pairs = [(fused.geglu(y), plain_geglu(y.float()))]
    for activate in (False, True):
        out = fused.group_norm(x, norm.weight.to(dtype), norm.bias.to(dtype), 4, norm.eps, activate)
        pairs.append((out, plain_group_norm(x.float(), norm, activate)))
    errors: list[float] = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    return max(errors)

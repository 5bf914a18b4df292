"""GroupNorm with SiLU, and GEGLU's product: torch's own, or on a GPU kernels that read and write once.

The plain form is the definition. Triton is imported when the first tensor of a GPU comes by, never on a CPU.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

log = logging.getLogger(__name__)

CLOSE = 4e-3  # that a kernel's numbers may be from the plain form's in 16 bits, relative to the largest


def group_norm(x: Tensor, norm: nn.GroupNorm, activate: bool = False) -> Tensor:
    """x (B, C, h, w) normalised, then through SiLU if it is to be activated."""
    fused = fused_for(x)
    # By torch, a GPU's channels_last becomes contiguous here, and its convolutions turn it back.
    if fused and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return fused.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, activate)
    return plain_group_norm(x, norm, activate)


def plain_group_norm(x: Tensor, norm: nn.GroupNorm, activate: bool) -> Tensor:
    return silu(norm(x)) if activate else norm(x)


def geglu(x: Tensor) -> Tensor:
    """The first half of x (..., 2 C), gated by the exact GELU of the other -> (..., C)."""
    fused = fused_for(x)
    return fused.geglu(x) if fused and x.is_contiguous() else plain_geglu(x)


def plain_geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)


def fused_for(x: Tensor) -> ModuleType | None:
    """The kernels for a tensor; None where torch's own is used: on a CPU, and where gradients are wanted."""
    return fused_on(x.device) if x.is_cuda and not torch.is_grad_enabled() else None


@cache
def fused_on(device: torch.device) -> ModuleType | None:
    """The kernels of a GPU that has been seen to compile them and to give the plain form's numbers.

    Called first outside of any graph: it compiles, and waits for the device.
    """
    try:
        from models.networks import triton_kernels  # a C compiler is needed to run it, which slim images lack

        off = error_of(triton_kernels, device)
    except Exception:
        log.warning("no fused kernels on %s: they cannot be built", device, exc_info=True)
        return None
    if not off <= CLOSE:
        log.warning("no fused kernels on %s: they are off by %.1e", device, off)
        return None
    return triton_kernels


def error_of(fused: ModuleType, device: torch.device, dtype: torch.dtype = torch.float16) -> float:
    """The largest error of the kernels against the plain form in float32, relative to the largest number."""
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
        given = fused.group_norm(x, norm.weight.to(dtype), norm.bias.to(dtype), 4, norm.eps, activate)
        pairs.append((given, plain_group_norm(x.float(), norm, activate)))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

"""Norms with what is next to them, and GEGLU's product: torch's operators, or fused kernels on a GPU.

The plain functions define the result; the fused kernels read and write memory once. Triton is imported for
the first tensor on a GPU, never on a CPU.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, linear, silu

log = logging.getLogger(__name__)

TOLERANCE = 4e-3  # largest error of a kernel in float16, relative to the largest value of the plain function


def group_norm(x: Tensor, norm: nn.GroupNorm, activate: bool = False) -> Tensor:
    """GroupNorm of x (B, C, h, w), followed by SiLU if `activate`."""
    fused = fused_for(x)
    # torch's GroupNorm would return a contiguous tensor here, which the next convolution converts back.
    if fused and channels_last(x):
        out: Tensor = fused.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, activate)
        return out
    return plain_group_norm(x, norm, activate)


def plain_group_norm(x: Tensor, norm: nn.GroupNorm, activate: bool) -> Tensor:
    normalised: Tensor = norm(x)
    return silu(normalised) if activate else normalised


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.GroupNorm, shift: Tensor | None = None) -> Tensor:
    """GroupNorm with SiLU of a convolution's output, to which shift (B, C) is added before."""
    fused = fused_for(x)
    if fused and is_plain(conv):
        h = as_channels_last(without_bias(conv, x))
        out: Tensor = fused.group_norm(
            h, norm.weight, norm.bias, norm.num_groups, norm.eps, True, conv.bias, shift
        )
        return out
    h = conv(x)
    return group_norm(h if shift is None else h + shift[:, :, None, None], norm, activate=True)


def conv_add(x: Tensor, conv: nn.Conv2d, y: Tensor, skip: nn.Module) -> Tensor:
    """conv(x) + skip(y); skip: a convolution or nn.Identity."""
    fused, bias = fused_for(x), None
    if fused and is_plain(conv) and (is_plain(skip) or isinstance(skip, nn.Identity)):
        one = without_bias(conv, x)
        if isinstance(skip, nn.Conv2d):
            y, bias = without_bias(skip, y), skip.bias
        total: Tensor = fused.add_biased(*map(as_channels_last, (one, y)), conv.bias, bias)
        return total
    out: Tensor = skip(y) + conv(x)
    return out


def add_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + y and its LayerNorm, of x and y (B, N, C)."""
    fused = fused_for(x)
    if fused and x.is_contiguous() and y.is_contiguous():
        both: tuple[Tensor, Tensor] = fused.add_layer_norm(x, y, norm.weight, norm.bias, norm.eps)
        return both
    return plain_add_norm(x, y, norm)


def plain_add_norm(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, norm(total)


def to_tokens(x: Tensor, layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> Tensor:
    """A linear layer or 1x1 convolution of every cell: x (B, C, h, w) -> (B, h*w, C')."""
    if not isinstance(layer, nn.Linear) and not fused_for(x):
        y: Tensor = layer(x if isinstance(layer, nn.Conv2d) else x.flatten(2))
        return y.flatten(2).transpose(1, 2)
    out: Tensor = linear(x.flatten(2).transpose(1, 2), layer.weight.flatten(1), layer.bias)
    return out


def from_tokens(y: Tensor, layer: nn.Linear | nn.Conv1d | nn.Conv2d, size: torch.Size) -> Tensor:
    """A linear layer or 1x1 convolution of every cell: y (B, h*w, C) -> (B, C', h, w); size: (h, w)."""
    if not isinstance(layer, nn.Linear) and not fused_for(y):
        x = y.transpose(1, 2)
        cells = layer(x.unflatten(2, size) if isinstance(layer, nn.Conv2d) else x).flatten(2)
    else:
        cells = linear(y, layer.weight.flatten(1), layer.bias).transpose(1, 2)
    out: Tensor = cells.unflatten(2, size)
    return out


def channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def as_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def is_plain(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution with a bias and padded with zeros, and no other kind of it."""
    return type(conv) is nn.Conv2d and conv.bias is not None


def without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution; cuDNN would add the bias by another kernel."""
    padding = cast("tuple[int, int]", conv.padding)
    return conv2d(x, conv.weight, None, conv.stride, padding, conv.dilation, conv.groups)


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

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    def image(*shape: int) -> Tensor:
        return noise(*shape).contiguous(memory_format=torch.channels_last)

    y, rows, others, bias, shift = noise(3, 5, 48), noise(6, 40), noise(6, 40), noise(40), noise(2, 40)
    norm, layer_norm = nn.GroupNorm(4, 40, device=device), nn.LayerNorm(40, device=device)
    pairs = [(fused.geglu(y), plain_geglu(y.float()))]
    for side in (9, 33):  # each of the two ways to compute a norm
        x, other = image(2, 40, side, 33), image(2, 40, side, 33)
        total = x.float() + bias.float()[:, None, None]
        pairs.append((fused.add_biased(x, other, bias), total + other.float()))
        for activate in (False, True):
            given = norm.weight.to(dtype), norm.bias.to(dtype), 4, norm.eps, activate
            pairs.append((fused.group_norm(x, *given), plain_group_norm(x.float(), norm, activate)))
            shifted = plain_group_norm(total + shift.float()[:, :, None, None], norm, activate)
            pairs.append((fused.group_norm(x, *given, bias, shift), shifted))
    given_rows = layer_norm.weight.to(dtype), layer_norm.bias.to(dtype), layer_norm.eps
    sums = fused.add_layer_norm(rows, others, *given_rows)
    pairs += zip(sums, plain_add_norm(rows.float(), others.float(), layer_norm), strict=True)
    errors: list[float] = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
    return max(errors)

"""Kernels in Triton for channels_last tensors on a GPU, or anywhere through its interpreter.

Sums are taken in float32, in an order that depends on the shape of one picture alone: how many rows there are
and which of them one is changes no bit of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WIDTH = 64, 64  # cells and channels of a tile: 128 bytes of each cell are read together in 16 bits
TILES = 64  # whose moments are put together at once
LENGTH = 1024  # numbers of GEGLU that a program makes


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activate: bool = False
) -> Tensor:
    """GroupNorm, then SiLU if activate. x (B, C, h, w) in channels_last -> the same."""
    images, channels, h, w = x.shape
    cells, width = h * w, channels // groups
    grid = (triton.cdiv(cells, ROWS), triton.cdiv(channels, WIDTH), images)
    moments = torch.empty(2, images, grid[0], channels, device=x.device, dtype=torch.float32)
    of_groups = torch.empty(2, images, groups, device=x.device, dtype=torch.float32)
    out = torch.empty_like(x)  # strides too
    tile_moments[grid](x, moments[0], moments[1], cells, channels, ROWS, WIDTH)
    group_moments[groups, images](
        moments[0], moments[1], of_groups[0], of_groups[1], cells, channels, grid[0], width, eps,
        ROWS, triton.next_power_of_2(width), TILES,
    )  # fmt: skip
    normalise[grid](
        x, of_groups[0], of_groups[1], weight, bias, out, cells, channels, groups, width,
        activate, ROWS, WIDTH,
    )  # fmt: skip
    return out


def geglu(x: Tensor) -> Tensor:
    """value * gelu(gate) of x (..., 2 C), contiguous: value, then gate -> (..., C)."""
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, device=x.device, dtype=x.dtype)
    rows = out.numel() // width
    if rows:
        block = min(LENGTH, triton.next_power_of_2(width))
        gate_values[rows, triton.cdiv(width, block)](x, out, width, block)
    return out


@triton.jit
def tile_moments(x, means, squares, cells, channels, rows: tl.constexpr, span: tl.constexpr):
    """Of each channel over a tile's cells: the mean, and the sum of squared distances to it.

    Not the sum of squares: where the mean is large, that leaves no digits.
    """
    tile, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    cell = tile * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * span + tl.arange(0, span)
    inside = (cell < cells)[:, None] & (channel < channels)[None, :]
    place = (image * cells + cell[:, None]) * channels + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=0) / tl.minimum(rows, cells - tile * rows)
    distance = tl.where(inside, value - mean[None, :], 0.0)
    to = (image * tl.num_programs(0) + tile) * channels + channel
    tl.store(means + to, mean, mask=channel < channels)
    tl.store(squares + to, tl.sum(distance * distance, axis=0), mask=channel < channels)


@triton.jit
def group_moments(
    means, squares, mean_out, scale_out, cells, channels, tiles, width, eps,
    rows: tl.constexpr, span: tl.constexpr, batch: tl.constexpr,
):  # fmt: skip
    """Of each group over a picture: its mean and 1 / sqrt(variance + eps), out of the tiles' moments."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, span)
    total = tl.zeros([batch, span], tl.float32)
    for begin in range(0, tiles, batch):
        tile = begin + tl.arange(0, batch)
        inside = (tile < tiles)[:, None] & (channel < width)[None, :]
        place = (image * tiles + tile[:, None]) * channels + group * width + channel[None, :]
        count = tl.minimum(rows, cells - tile * rows).to(tl.float32)[:, None]
        total += count * tl.load(means + place, mask=inside, other=0.0)
    number = (cells * width).to(tl.float32)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / number
    total = tl.zeros([batch, span], tl.float32)
    for begin in range(0, tiles, batch):
        tile = begin + tl.arange(0, batch)
        inside = (tile < tiles)[:, None] & (channel < width)[None, :]
        place = (image * tiles + tile[:, None]) * channels + group * width + channel[None, :]
        count = tl.minimum(rows, cells - tile * rows).to(tl.float32)[:, None]
        distance = tl.load(means + place, mask=inside, other=0.0) - mean
        within = tl.load(squares + place, mask=inside, other=0.0)
        total += tl.where(inside, within + count * distance * distance, 0.0)
    variance = tl.sum(tl.sum(total, axis=1), axis=0) / number
    to = image * tl.num_programs(0) + group
    tl.store(mean_out + to, mean)
    tl.store(scale_out + to, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def normalise(
    x, means, scales, weight, bias, out, cells, channels, groups, width,
    activate: tl.constexpr, rows: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """A tile of the result."""
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * span + tl.arange(0, span)
    known = channel < channels
    inside = (cell < cells)[:, None] & known[None, :]
    place = (image * cells + cell[:, None]) * channels + channel[None, :]
    group = image * groups + channel // width
    mean = tl.load(means + group, mask=known, other=0.0)[None, :]
    scale = tl.load(scales + group, mask=known, other=0.0)[None, :]
    factor = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    y = (value - mean) * scale * factor + shift
    if activate:
        y = y * tl.sigmoid(y)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_values(x, out, width, span: tl.constexpr):
    """A part of one row of GEGLU; gelu(g) = g / 2 (1 + erf(g / sqrt 2))."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * span + tl.arange(0, span)
    inside = place < width
    value = tl.load(x + row * 2 * width + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + place, mask=inside, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out + row * width + place, y.to(out.dtype.element_ty), mask=inside)

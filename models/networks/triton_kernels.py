"""Triton kernels for channels_last tensors on a GPU, or on a CPU through Triton's interpreter.

Sums are in float32, in an order that depends only on the shape of one image: neither the number of images
in the batch nor an image's position changes its bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_CELLS = 64
TILE_CHANNELS = 64  # 128 bytes per cell in 16 bits: one memory transaction
TILES_PER_SUM = 64  # tiles whose moments are combined at once
MAX_GEGLU_BLOCK = 1024  # output values of one GEGLU program


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activate: bool = False
) -> Tensor:
    """GroupNorm, then SiLU if `activate`; x (B, C, h, w) in channels_last -> the same shape and layout."""
    images, channels, h, w = x.shape
    cells, width = h * w, channels // groups
    grid = (triton.cdiv(cells, TILE_CELLS), triton.cdiv(channels, TILE_CHANNELS), images)
    moments = torch.empty(2, images, grid[0], channels, device=x.device, dtype=torch.float32)
    group_stats = torch.empty(2, images, groups, device=x.device, dtype=torch.float32)
    out = torch.empty_like(x)  # same strides
    tile_moments[grid](x, moments[0], moments[1], cells, channels, TILE_CELLS, TILE_CHANNELS)
    group_moments[groups, images](
        moments[0], moments[1], group_stats[0], group_stats[1], cells, channels, grid[0], width, eps,
        TILE_CELLS, triton.next_power_of_2(width), TILES_PER_SUM,
    )  # fmt: skip
    normalise[grid](
        x, group_stats[0], group_stats[1], weight, bias, out, cells, channels, groups, width,
        activate, TILE_CELLS, TILE_CHANNELS,
    )  # fmt: skip
    return out


def geglu(x: Tensor) -> Tensor:
    """value * gelu(gate), both halves of a contiguous x (..., 2 C): value, then gate -> (..., C)."""
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, device=x.device, dtype=x.dtype)
    rows = out.numel() // width
    if rows:
        block = min(MAX_GEGLU_BLOCK, triton.next_power_of_2(width))
        gate_values[rows, triton.cdiv(width, block)](x, out, width, block)
    return out


@triton.jit
def tile_moments(x, means, squares, cells, channels, rows: tl.constexpr, span: tl.constexpr):
    """The mean of each channel over a tile's cells, and the sum of squared distances to it.

    A plain sum of squares would cancel catastrophically where the mean is large.
    """
    tile, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    cell = tile * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * span + tl.arange(0, span)
    inside = (cell < cells)[:, None] & (channel < channels)[None, :]
    offset = (image * cells + cell[:, None]) * channels + channel[None, :]
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
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
    """The mean and 1 / sqrt(variance + eps) of each group of an image, from the moments of its tiles."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, span)
    total = tl.zeros([batch, span], tl.float32)
    for begin in range(0, tiles, batch):
        tile = begin + tl.arange(0, batch)
        inside = (tile < tiles)[:, None] & (channel < width)[None, :]
        offset = (image * tiles + tile[:, None]) * channels + group * width + channel[None, :]
        count = tl.minimum(rows, cells - tile * rows).to(tl.float32)[:, None]
        total += count * tl.load(means + offset, mask=inside, other=0.0)
    number = (cells * width).to(tl.float32)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / number
    total = tl.zeros([batch, span], tl.float32)
    for begin in range(0, tiles, batch):
        tile = begin + tl.arange(0, batch)
        inside = (tile < tiles)[:, None] & (channel < width)[None, :]
        offset = (image * tiles + tile[:, None]) * channels + group * width + channel[None, :]
        count = tl.minimum(rows, cells - tile * rows).to(tl.float32)[:, None]
        distance = tl.load(means + offset, mask=inside, other=0.0) - mean
        within = tl.load(squares + offset, mask=inside, other=0.0)
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
    """One tile of the normalised output."""
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * span + tl.arange(0, span)
    valid = channel < channels
    inside = (cell < cells)[:, None] & valid[None, :]
    offset = (image * cells + cell[:, None]) * channels + channel[None, :]
    group = image * groups + channel // width
    mean = tl.load(means + group, mask=valid, other=0.0)[None, :]
    scale = tl.load(scales + group, mask=valid, other=0.0)[None, :]
    factor = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    y = (value - mean) * scale * factor + shift
    if activate:
        y = y * tl.sigmoid(y)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_values(x, out, width, span: tl.constexpr):
    """One part of a row of GEGLU; gelu(g) = g / 2 (1 + erf(g / sqrt 2))."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * span + tl.arange(0, span)
    inside = offset < width
    value = tl.load(x + row * 2 * width + offset, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + offset, mask=inside, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out + row * width + offset, y.to(out.dtype.element_ty), mask=inside)

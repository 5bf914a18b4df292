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
MAX_TILES = 256  # of an image; larger images have larger tiles, which are read in parts of TILE_CELLS
TILES_PER_SUM = 64  # tiles whose moments are combined at once
MAX_CELLS_AT_ONCE = 1024  # of an image each of whose groups one program normalises
GROUP_BLOCK = 4096  # values of a group that a program reads at once
MAX_GEGLU_BLOCK = 1024  # output values of one GEGLU program
SUM_BLOCK = 1024  # output values of one program of add_biased()


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activate: bool = False,
    added: Tensor | None = None, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """GroupNorm of x + added + shift, then SiLU if `activate`; x (B, C, h, w) in channels_last, and so is the
    result. added: (C,); shift: (B, C), whose rows are contiguous.
    """
    images, channels, h, w = x.shape
    cells, width = h * w, channels // groups
    stride = 0 if shift is None else shift.stride(0)
    out = torch.empty_like(x)  # same strides
    if cells <= MAX_CELLS_AT_ONCE:
        span = triton.next_power_of_2(width)
        whole_groups[groups, images](
            x, added, shift, weight, bias, out, stride, cells, channels, width, eps,
            activate, max(GROUP_BLOCK // span, 1), span,
        )  # fmt: skip
        return out
    parts = triton.cdiv(triton.cdiv(cells, TILE_CELLS), MAX_TILES)
    tiles = triton.cdiv(cells, parts * TILE_CELLS)
    moments = torch.empty(2, images, tiles, channels, device=x.device, dtype=torch.float32)
    group_stats = torch.empty(2, images, groups, device=x.device, dtype=torch.float32)
    tile_moments[tiles, triton.cdiv(channels, TILE_CHANNELS), images](
        x, added, shift, moments[0], moments[1], stride, cells, channels, parts, TILE_CELLS, TILE_CHANNELS
    )
    group_moments[groups, images](
        moments[0], moments[1], group_stats[0], group_stats[1], cells, channels, tiles, width, eps,
        parts * TILE_CELLS, triton.next_power_of_2(width), TILES_PER_SUM,
    )  # fmt: skip
    normalise[triton.cdiv(cells, TILE_CELLS), triton.cdiv(channels, TILE_CHANNELS), images](
        x, added, shift, group_stats[0], group_stats[1], weight, bias, out, stride, cells, channels, groups,
        width, activate, TILE_CELLS, TILE_CHANNELS,
    )  # fmt: skip
    return out


def add_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its LayerNorm, of contiguous x and y (..., C)."""
    width = x.shape[-1]
    total, out = torch.empty_like(x), torch.empty_like(x)
    if rows := x.numel() // width:
        layer_norm_rows[rows,](x, y, weight, bias, total, out, width, eps, triton.next_power_of_2(width))
    return total, out


def add_biased(x: Tensor, y: Tensor, bias: Tensor, other: Tensor | None = None) -> Tensor:
    """x + y + bias + other; x, y (B, C, h, w) in channels_last, and so is the result; bias, other (C,)."""
    out = torch.empty_like(x)
    blocks = triton.cdiv(x.numel(), SUM_BLOCK)
    if blocks:
        biased_sums[blocks,](x, y, bias, other, out, x.numel(), x.shape[1], SUM_BLOCK)
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
def channel_terms(added, shift, stride, image, channel, valid):
    """What is added to each channel of an image before it is normalised, in float32."""
    terms = tl.zeros_like(channel).to(tl.float32)
    if added is not None:
        terms += tl.load(added + channel, mask=valid, other=0.0).to(tl.float32)
    if shift is not None:
        terms += tl.load(shift + image * stride + channel, mask=valid, other=0.0).to(tl.float32)
    return terms


@triton.jit
def whole_groups(
    x, added, shift, weight, bias, out, stride, cells, channels, width, eps,
    activate: tl.constexpr, rows: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """One group of one image: its mean, its variance, and the normalised output."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, span)
    channel, valid = group * width + lane, lane < width
    terms = channel_terms(added, shift, stride, image, channel, valid)[None, :]
    number = (cells * width).to(tl.float32)
    total = tl.zeros([rows, span], tl.float32)
    for begin in range(0, cells, rows):
        cell = begin + tl.arange(0, rows)
        inside = (cell < cells)[:, None] & valid[None, :]
        offset = (image * cells + cell[:, None]) * channels + channel[None, :]
        total += tl.where(inside, tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) + terms, 0.0)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / number
    total = tl.zeros([rows, span], tl.float32)
    for begin in range(0, cells, rows):
        cell = begin + tl.arange(0, rows)
        inside = (cell < cells)[:, None] & valid[None, :]
        offset = (image * cells + cell[:, None]) * channels + channel[None, :]
        distance = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) + terms - mean
        total += tl.where(inside, distance * distance, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(tl.sum(total, axis=1), axis=0) / number + eps)
    factor = scale * tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    end = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    for begin in range(0, cells, rows):
        cell = begin + tl.arange(0, rows)
        inside = (cell < cells)[:, None] & valid[None, :]
        offset = (image * cells + cell[:, None]) * channels + channel[None, :]
        y = (tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) + terms - mean) * factor + end
        if activate:
            y = y * tl.sigmoid(y)
        tl.store(out + offset, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def tile_moments(
    x, added, shift, means, squares, stride, cells, channels, parts,
    rows: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """The mean of each channel over a tile's cells, and the sum of squared distances to it.

    A plain sum of squares would cancel catastrophically where the mean is large.
    """
    tile, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * span + tl.arange(0, span)
    valid, first = channel < channels, tile * parts * rows
    terms = channel_terms(added, shift, stride, image, channel, valid)
    total = tl.zeros([span], tl.float32)
    for part in range(parts):
        cell = first + part * rows + tl.arange(0, rows)
        inside = (cell < cells)[:, None] & valid[None, :]
        offset = (image * cells + cell[:, None]) * channels + channel[None, :]
        total += tl.sum(tl.load(x + offset, mask=inside, other=0.0).to(tl.float32), axis=0)
    mean = total / tl.minimum(parts * rows, cells - first)
    total = tl.zeros([span], tl.float32)
    for part in range(parts):
        cell = first + part * rows + tl.arange(0, rows)
        inside = (cell < cells)[:, None] & valid[None, :]
        offset = (image * cells + cell[:, None]) * channels + channel[None, :]
        distance = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        total += tl.sum(tl.where(inside, distance * distance, 0.0), axis=0)
    to = (image * tl.num_programs(0) + tile) * channels + channel
    tl.store(means + to, mean + terms, mask=valid)
    tl.store(squares + to, total, mask=valid)


@triton.jit
def group_moments(
    means, squares, mean_out, scale_out, cells, channels, tiles, width, eps, rows,
    span: tl.constexpr, batch: tl.constexpr,
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
    x, added, shift, means, scales, weight, bias, out, stride, cells, channels, groups, width,
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
    end = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    terms = channel_terms(added, shift, stride, image, channel, valid)[None, :]
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) + terms
    y = (value - mean) * scale * factor + end
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


@triton.jit
def layer_norm_rows(x, y, weight, bias, total, out, width, eps, span: tl.constexpr):
    """One row of x + y and of its LayerNorm."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, span)
    inside = lane < width
    offset = row * width + lane
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + offset, value.to(total.dtype.element_ty), mask=inside)
    mean = tl.sum(value, axis=0) / width
    distance = tl.where(inside, value - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(distance * distance, axis=0) / width + eps)
    factor = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    end = tl.load(bias + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, (distance * scale * factor + end).to(out.dtype.element_ty), mask=inside)


@triton.jit
def biased_sums(x, y, bias, other, out, count, channels, span: tl.constexpr):
    """A block of x + y + bias + other; the channel is the innermost dimension."""
    offset = tl.program_id(0).to(tl.int64) * span + tl.arange(0, span)
    inside, channel = offset < count, offset % channels
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if other is not None:
        value += tl.load(other + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)

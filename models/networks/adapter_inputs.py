"""What adapters hand to the UNet: residuals of ControlNets, features of T2I-Adapters, image tokens."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from models.networks.attention_backends import attend
from models.transfer import upload

Tensors = tuple[Tensor | None, ...]

NEUTRAL = -0.0  # x + NEUTRAL has the bits of x, also where x is -0.0


@dataclass(frozen=True)
class ImageTokens:
    """Keys and values of image tokens for every cross-attention layer (Ye et al. 2023, equation 5).

    keys, values: (R, n, W), layer after layer in the UNet's order: `CrossAttention.columns` says which are a
    layer's. scales: (R,); 0 leaves a row's values unchanged, if its keys and values are finite.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor

    def attend(self, q: Tensor, columns: slice) -> Tensor:
        """q (R, heads, N, d) -> the scaled output of attention to the image tokens, of the same shape."""
        heads = q.shape[1]
        k, v = (
            x[..., columns].unflatten(-1, (heads, -1)).transpose(1, 2) for x in (self.keys, self.values)
        )  # (R, heads, n, d)
        return self.scales.to(q.dtype)[:, None, None, None] * attend(q, k, v)


@dataclass(frozen=True)
class AdapterInputs:
    """Inputs of one UNet call from adapters, R rows of each; rows without an adapter have NEUTRAL values.

    skips: added to the skip connections where the decoder takes them, one for each input block; middle: added
    to the middle block's output (Zhang et al. 2023, section 3.2). features: added to the output of an input
    block before it is stored as a skip connection, one for each input block or None (Mou et al. 2023, section
    3.3). images: one entry for each adapter that a row can have, and each number of tokens.
    """

    skips: tuple[Tensor, ...] = ()
    middle: Tensor | None = None
    features: Tensors = ()
    images: tuple[ImageTokens, ...] = ()

    def after_block(self, index: int, x: Tensor) -> Tensor:
        """The output of an input block, with its feature."""
        return added(x, self.features[index]) if self.features else x

    def after_middle(self, x: Tensor) -> Tensor:
        """The middle block's output, with the residual."""
        return added(x, self.middle)

    def after_encoder(self, skips: list[Tensor]) -> list[Tensor]:
        """The skip connections that the decoder takes, of the first input blocks."""
        residuals = self.skips[: len(skips)]
        return [added(x, each) for x, each in zip(skips, residuals, strict=True)] if residuals else skips


@dataclass(frozen=True)
class RowInputs:
    """Inputs of some rows of a UNet call. rows: their numbers in the call, each at most once."""

    rows: Sequence[int]
    inputs: AdapterInputs


def combined(count: int, parts: Sequence[RowInputs]) -> AdapterInputs | None:
    """The inputs of a UNet call of `count` rows; None without parts.

    Residuals and features of a row add up in the order of the parts. Rows get NEUTRAL for what they have no
    part of. Image tokens of equal number share one entry if they are of different rows, and entries are in
    the order of their numbers of tokens. So a row's bits do not depend on the adapters of other rows.
    """
    if not parts:
        return None
    skips = total(count, [(part.rows, part.inputs.skips) for part in parts])
    middles = total(count, [(part.rows, (part.inputs.middle,)) for part in parts])
    features = total(count, [(part.rows, part.inputs.features) for part in parts])
    return AdapterInputs(
        tuple(present(x) for x in skips), middles[0], features, tuple(shared_images(count, parts))
    )


def total(count: int, parts: Sequence[tuple[Sequence[int], Tensors]]) -> Tensors:
    """The sums of tensors at the same position, each (count, ...); None where no part has one."""
    columns = zip_longest(*(tensors for _, tensors in parts))
    indexes = [rows for rows, _ in parts]
    return tuple(
        summed(count, [(rows, x) for rows, x in zip(indexes, column, strict=True) if x is not None])
        for column in columns
    )


def summed(
    count: int, parts: Sequence[tuple[Sequence[int], Tensor]], neutral: float = NEUTRAL
) -> Tensor | None:
    """(count, ...): `neutral` values, to which the rows of every part are added."""
    if not parts:
        return None
    out = parts[0][1].new_full((count, *parts[0][1].shape[1:]), neutral)
    for rows, x in parts:
        out.index_add_(0, upload(torch.tensor(list(rows)), x.device), x)
    return out


def shared_images(count: int, parts: Sequence[RowInputs]) -> Iterator[ImageTokens]:
    """Image tokens of all rows, fewest tokens first; a row's entries of equal number keep their order."""
    entries: dict[tuple[int, int], list[tuple[Sequence[int], ImageTokens]]] = defaultdict(list)
    used = Counter[tuple[int, int]]()  # (tokens, row) -> entries that the row has passed
    for part in parts:
        for image in part.inputs.images:
            tokens = image.keys.shape[1]
            place = max(used[tokens, row] for row in part.rows)
            used.update({(tokens, row): place + 1 - used[tokens, row] for row in part.rows})
            entries[tokens, place].append((part.rows, image))
    for _, members in sorted(entries.items()):
        # Attention to values of 0 is 0, and 0 times a neutral scale is neutral.
        keys = summed(count, [(rows, image.keys) for rows, image in members], 0.0)
        values = summed(count, [(rows, image.values) for rows, image in members], 0.0)
        scales = summed(count, [(rows, image.scales) for rows, image in members])
        yield ImageTokens(present(keys), present(values), present(scales))


def added(x: Tensor, other: Tensor | None) -> Tensor:
    """x + other, in the dtype of x: an adapter's may be another one."""
    return x if other is None else x + other.to(x.dtype)


def present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x

"""What controls and reference images add to a UNet call.

There is one call of each control network, for the rows on which it acts; the tokens of reference images are
made when a job starts. Rows of jobs with none, one and several of them share the UNet call. As a UNet call,
a call of a control network is padded to one of few sizes, so that a row's bits do not depend on other jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.adapters.controls import Control, Mode, Rows, scaled, weights
from models.networks.adapter_inputs import AdapterInputs, ImageTokens, RowInputs
from models.sampling.guidance import UNCONDITIONAL, StepRows
from models.transfer import upload
from service.device.graphs import Graphs
from service.device.tensor_tree import map_tensors, padded, rows_of
from service.engine.runner import padded_size


@dataclass(frozen=True, eq=False)
class ControlUse:
    """A control of a job. prepared: what its image became, one row of each tensor; type: its control type."""

    control: Control
    prepared: tuple[Tensor, ...]
    scale: float
    start: float
    end: float
    mode: Mode
    type: int = 0

    def strengths(self, conditional: bool) -> tuple[float, ...]:
        """The weight of each residual on a row; () if the control does not act on it."""
        return weights(self.control, self.mode, self.scale, conditional)


@dataclass(frozen=True, eq=False)
class ReferenceUse:
    """A reference image of a job. keys, values: (2, n, W), of unconditional and of conditional rows."""

    keys: Tensor
    values: Tensor
    scale: float
    start: float
    end: float


class ControlledRow(NamedTuple):
    """A row of a UNet call on which a control acts. order: of the control among those of its job."""

    row: int
    order: int
    use: ControlUse
    strengths: tuple[float, ...]


def controlled_rows(
    uses: Sequence[Sequence[ControlUse]], rows: Sequence[StepRows]
) -> Iterator[ControlledRow]:
    """The controlled rows of a call, of the controls that act on each image, and the rows of each image."""
    first = 0
    for own_uses, own in zip(uses, rows, strict=True):
        for order, use in enumerate(own_uses):
            for offset, condition in enumerate(own.rows):
                if strengths := use.strengths(condition != UNCONDITIONAL):
                    yield ControlledRow(first + offset, order, use, strengths)
        first += len(own.rows)


def control_inputs(
    controlled: Iterable[ControlledRow], rows: Rows, sizes: Sequence[int], graphs: Graphs
) -> list[RowInputs]:
    """The scaled residuals and features of all controlled rows, for combined(). rows: all rows of the call.

    sizes: row counts of calls, the last one is the maximum. The residuals of a row are in the order of its
    job's controls, whatever other jobs there are: the order decides the last bits of their sum.
    """
    by_control: dict[int, list[ControlledRow]] = {}
    for each in controlled:
        by_control.setdefault(id(each.use.control), []).append(each)
    parts: list[tuple[int, RowInputs]] = []
    for own in by_control.values():
        for begin in range(0, len(own), sizes[-1]):
            chunk = own[begin : begin + sizes[-1]]
            inputs = call_control(chunk, rows, sizes, graphs)
            for order in sorted({each.order for each in chunk}):
                places = [place for place, each in enumerate(chunk) if each.order == order]
                parts.append((order, RowInputs([chunk[place].row for place in places], pick(inputs, places))))
    return [inputs for _, inputs in sorted(parts, key=lambda part: part[0])]


def reference_inputs(
    uses: Sequence[Sequence[ReferenceUse]], rows: Sequence[StepRows], device: torch.device
) -> list[RowInputs]:
    """The tokens of the reference images that act on each image, for combined(). rows: of each image."""
    entries: dict[tuple[int, int], list[tuple[int, ReferenceUse, int]]] = {}
    first = 0
    for own_uses, own in zip(uses, rows, strict=True):
        for order, use in enumerate(own_uses):
            for offset, condition in enumerate(own.rows):
                entry = (first + offset, use, int(condition != UNCONDITIONAL))
                entries.setdefault((order, use.keys.shape[1]), []).append(entry)
        first += len(own.rows)
    parts = []
    for _, members in sorted(entries.items()):
        keys = torch.stack([use.keys[condition] for _, use, condition in members])
        values = torch.stack([use.values[condition] for _, use, condition in members])
        scales = upload(torch.tensor([use.scale for _, use, _ in members]), device)
        images = (ImageTokens(keys, values, scales),)
        parts.append(RowInputs([row for row, *_ in members], AdapterInputs(images=images)))
    return parts


def call_control(
    chunk: Sequence[ControlledRow], rows: Rows, sizes: Sequence[int], graphs: Graphs
) -> AdapterInputs:
    """One call of a control network: its scaled inputs of n rows, padded to a size meanwhile."""
    control, device, count = chunk[0].use.control, rows.x.device, len(chunk)
    index = upload(torch.tensor([each.row for each in chunk]), device)
    types = upload(torch.tensor([each.use.type for each in chunk]), device) if control.types else None
    prepared = tuple(torch.cat(parts) for parts in zip(*(each.use.prepared for each in chunk), strict=True))
    own = (prepared, map_tensors(lambda x: x[index], rows), types)
    if control.every_step:
        size = padded_size(count, sizes)
        inputs = graphs.run(control.network, partial(run_control, control), *padded(own, size - count))
        inputs = rows_of(inputs, slice(count))
    else:
        inputs = control.inputs(*own)
    strengths = upload(torch.tensor([each.strengths for each in chunk]), device)
    return scaled(inputs, strengths)


def run_control(
    control: Control, prepared: tuple[Tensor, ...], rows: Rows, types: Tensor | None
) -> AdapterInputs:
    return control.inputs(prepared, rows, types)


def pick(inputs: AdapterInputs, places: Sequence[int]) -> AdapterInputs:
    """Some of the rows."""
    index = torch.tensor(places)
    return map_tensors(lambda x: x[upload(index, x.device)], inputs)


def in_float32(control: Control) -> Control:
    """A copy of a control in float32."""
    own: Any = control  # a dataclass
    copy: Control = replace(own, network=deepcopy(control.network).float())
    return copy

"""Reads the noise schedule and the scale factor in a single file, which may have been rounded to 16 bits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.errors import CheckpointError
from models.formats.safetensors import FLOATS, Header, read_values
from models.sampling.schedule import Schedule
from models.spec import ScheduleSpec

# Largest relative difference between numbers of two sources. Files that were converted to half precision have
# rounded tables too.
TOLERANCE = 1e-4
HALF_TOLERANCES = {"float16": 2e-3, "bfloat16": 1e-2}

Array = np.ndarray[Any, np.dtype[np.float64]]


class Ends(NamedTuple):
    """The first and the last beta of a schedule, before a rescaling to zero terminal SNR."""

    start: float
    end: float


@dataclass(frozen=True)
class Table:
    """The numbers of a small tensor, and their relative tolerance."""

    values: Array
    tolerance: float

    @property
    def exact(self) -> bool:
        return self.tolerance == TOLERANCE

    @property
    def zero_terminal_snr(self) -> bool:
        """Of betas: whether no signal is left at the last timestep."""
        return bool(self.values[-1] == 1)


def read_table(file: Path, header: Header, key: str) -> Table | None:
    """A tensor's numbers; None if it is missing, or in 8 bits, which are too imprecise.

    Raises CheckpointError if its type is not a float type.
    """
    stored = header.tensors.get(key)
    if stored is None or stored.dtype.startswith("float8"):
        return None
    if stored.dtype not in FLOATS:
        raise CheckpointError(f"{file}: {key} has the type {stored.dtype}, expected floats")
    return Table(read_values(file, stored), HALF_TOLERANCES.get(stored.dtype, TOLERANCE))


def read_scale_factor(file: Path, header: Header) -> Table | None:
    """The latents' scale factor, if the file contains it."""
    table = read_table(file, header, "scale_factor")
    if table and (table.values.size != 1 or not 0 < table.values.item() < math.inf):
        raise CheckpointError(f"{file}: its scale_factor is not one number above 0")
    return table


def read_betas(file: Path, header: Header, key: str = "betas") -> Table | None:
    """The betas, if the file contains them."""
    table = read_table(file, header, key)
    if table is None:
        return None
    betas = table.values
    last = betas[-1:] if betas.ndim == 1 else betas
    if (
        betas.ndim != 1
        or len(betas) < 2
        or not ((betas[:-1] > 0) & (betas[:-1] < 1)).all()
        or not 0 < last <= 1
    ):
        raise CheckpointError(f"{file}: its betas are not numbers between 0 and 1")
    return table


def ends_of(table: Table, known: Iterable[Ends]) -> Ends:
    """The first and last beta of a table.

    For a rounded table, those ends among `known` that equal the table's within its tolerance. Otherwise the
    table's own, to the seven digits of float32.
    """
    first, last = float(table.values[0]), float(table.values[-1])
    if not table.exact or table.zero_terminal_snr:
        for ends in known:
            if near(ends.start, first, table) and (table.zero_terminal_snr or near(ends.end, last, table)):
                return ends
    return Ends(float(f"{first:.6e}"), float(f"{last:.6e}"))


def near(expected: float, value: float, table: Table) -> bool:
    return math.isclose(expected, value, rel_tol=table.tolerance)


def check_betas(file: Path, table: Table | None, spec: ScheduleSpec) -> None:
    """Raise CheckpointError unless a file's betas, if it contains them, are those of a schedule."""
    if table is None:
        return
    # A file that is marked for a rescaled schedule may have the table from before the rescaling.
    expected = Schedule(replace(spec, zero_terminal_snr=table.zero_terminal_snr)).betas
    same = table.values.shape == expected.shape
    if not same or not np.allclose(table.values, expected, rtol=table.tolerance, atol=1e-8):
        raise CheckpointError(f"{file}: its betas are not {len(expected)} with evenly spaced square roots")


def check_equal(file: Path, option: str, claimed: float, actual: float, tolerance: float = TOLERANCE) -> None:
    """Raise CheckpointError if a configuration and the weights have different numbers."""
    if not math.isclose(claimed, actual, rel_tol=tolerance):
        raise CheckpointError(f"{file}: {option} is {claimed}, but the weights have {actual}")

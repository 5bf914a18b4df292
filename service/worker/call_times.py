"""How long UNet calls take by their rows, for the placement of jobs: fits of recent calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

MAX_KINDS = 4096
DECAY = 0.95  # weight of the earlier calls of a fit, each time that a call is added
UNKNOWN_SECONDS = 1e-6  # of one row of one pixel, before any call was measured


@dataclass(slots=True)
class Fit:
    """A weighted least-squares line through (x, seconds) of recent calls: fixed + rise * x / run.

    The line is never below 0 nor falling; without two different x, it goes through 0. weight, x, y, xx, xy:
    weighted sums.
    """

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    fixed: float = 0.0
    rise: float = 0.0
    run: float = 1.0

    def add(self, x: float, seconds: float) -> None:
        self.weight = DECAY * self.weight + 1
        self.x = DECAY * self.x + x
        self.y = DECAY * self.y + seconds
        self.xx = DECAY * self.xx + x * x
        self.xy = DECAY * self.xy + x * seconds
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        self.fixed, self.rise, self.run = 0.0, mean_y, mean_x
        variance = self.xx / self.weight - mean_x**2
        if variance >= 1e-6 * mean_x**2:
            slope = max(0.0, (self.xy / self.weight - mean_x * mean_y) / variance)
            if (fixed := mean_y - slope * mean_x) >= 0:
                self.fixed, self.rise, self.run = fixed, slope, 1.0

    def seconds(self, x: float) -> float:
        return self.fixed + self.rise * x / self.run

    @property
    def slope(self) -> float:
        return self.rise / self.run


class CallTimes:
    """Seconds of a UNet call of each kind by its rows; of an unknown kind by rows and pixels."""

    def __init__(self) -> None:
        self._fits: OrderedDict[Hashable, Fit] = OrderedDict()  # by last call
        self._all = Fit()

    def record(self, kind: Hashable, pixels: int, rows: int, seconds: float) -> None:
        """Add a call. A kind's first call is not measured, since it may compile kernels."""
        if kind not in self._fits:
            self._fits[kind] = Fit()
            if len(self._fits) > MAX_KINDS:
                self._fits.popitem(last=False)
            return
        self._fits.move_to_end(kind)
        self._fits[kind].add(rows, seconds)
        self._all.add(rows * pixels, seconds)

    def seconds(self, kind: Hashable, pixels: int, rows: float) -> float:
        """Seconds of a call, as far as known."""
        fit = self._fits.get(kind)
        if fit and fit.weight:
            return fit.seconds(rows)
        return self._all.seconds(rows * pixels) if self._all.weight else rows * pixels * UNKNOWN_SECONDS

    def row_seconds(self, kind: Hashable, pixels: int) -> float:
        """Seconds by which a row makes a call longer, as far as known."""
        fit = self._fits.get(kind)
        if fit and fit.weight:
            return fit.slope
        return pixels * (self._all.slope if self._all.weight else UNKNOWN_SECONDS)

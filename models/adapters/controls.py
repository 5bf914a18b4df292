"""What all controls have in common: how strongly, on which rows and at which steps they act.

A control is a ControlNet or a T2I-Adapter; control_net.open_control() opens either.

Where implementations differ, `diffusers` is followed: the ramp of the modes "prompt" and "control" is its
guess mode's, and a window contains the steps that lie in it completely. A1111's ramp is 0.825^(12 - i) for
residual i, and its controls act one step longer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.networks.adapter_inputs import AdapterInputs
from models.spec import ModelSpec

Mode = Literal["balanced", "prompt", "control"]
MODES: tuple[Mode, ...] = ("balanced", "prompt", "control")


class Rows(NamedTuple):
    """The inputs of R rows of a UNet call that a control network reads too."""

    x: Tensor  # (R, C_z, h, w), as the UNet gets it, without concat channels
    t: Tensor  # (R,)
    context: Tensor | None  # (R, L, C_ctx)
    pooled: Tensor | None  # (R, P)


class Control(Protocol):
    """A network that reads control images, ready to run."""

    @property
    def network(self) -> nn.Module:
        """Whose weights inputs() uses."""

    @property
    def kind(self) -> str:
        """What it is, for messages."""

    @property
    def types(self) -> tuple[str, ...]:
        """Kinds of control image, of which each use names one; () for a network for one kind."""

    @property
    def every_step(self) -> bool:
        """Whether inputs() calls a network; else it only places what prepare() returned."""

    @property
    def strengths(self) -> int:
        """How many weights a row has: one for each residual or feature."""

    @property
    def conditional_only(self) -> bool:
        """Whether it acts on rows with the prompt only, in every mode."""

    @property
    def inpaints(self) -> bool:
        """Whether its images need the mask of the request: see masked()."""

    @property
    def base(self) -> str:
        """The only model that it is for, "" for any that it fits."""

    @property
    def bytes(self) -> int:
        """Memory of the weights."""

    def misfit(self, model: ModelSpec) -> str | None:
        """Why it does not fit a model, as a clause; None if it does."""

    def fits(self, model: ModelSpec) -> bool:
        """Whether the model can use it."""

    def prepare(self, images: Tensor) -> tuple[Tensor, ...]:
        """Control images (B, 3, H, W) in [0, 1] of the output's size -> what inputs() needs, B rows of each.

        Needed once for each image. A network for one channel gets the mean of the three.
        """

    def inputs(self, prepared: tuple[Tensor, ...], rows: Rows, types: Tensor | None = None) -> AdapterInputs:
        """The unscaled inputs of R rows. types: (R,), indices in `types`, if there are any."""


def weights(control: Control, mode: Mode, scale: float, conditional: bool) -> tuple[float, ...]:
    """The weight of each residual on a row; () if the control does not act on it.

    "balanced": the scale. "prompt" and "control": a ramp of powers of ten from a tenth of the scale up to it,
    on all rows or on conditional rows only; `diffusers` calls the latter guess mode. conditional: whether the
    row has the prompt.
    """
    if not conditional and (mode == "control" or control.conditional_only):
        return ()
    count = control.strengths
    if mode == "balanced" or control.conditional_only:
        return (scale,) * count
    return tuple(scale * 10 ** (index / (count - 1) - 1) for index in range(count))


def scaled(inputs: AdapterInputs, strengths: Tensor) -> AdapterInputs:
    """Residuals or features of R rows times their weights (R, n), in the order of the inputs."""
    columns = iter(strengths.unbind(1))

    def times(x: Tensor) -> Tensor:
        return x * next(columns)[:, None, None, None].to(x.dtype)

    skips = tuple(times(x) for x in inputs.skips)
    features = tuple(None if x is None else times(x) for x in inputs.features)
    middle = None if inputs.middle is None else times(inputs.middle)
    return replace(inputs, skips=skips, features=features, middle=middle)


def is_active(step: int, steps: int, start: float, end: float) -> bool:
    """Whether a control with a window acts at a step of a run, counted from 0.

    start, end: fractions of the run. A step acts if it lies in the window completely, as in `diffusers`.
    """
    return step / steps >= start and (step + 1) / steps <= end


def masked(control: Control, images: Tensor, mask: Tensor) -> Tensor:
    """The control images of a control for inpainting: pixels to repaint get the value that it was trained on.

    images: (B, 3, H, W) in [0, 1]; mask: (B, 1, H, W), repainted where it is above a half. The value is -1,
    outside the range of images, for the ControlNet of Stable Diffusion 1.5, and 0 for ControlNet++.
    """
    value = 0.0 if control.types else -1.0
    return torch.where(mask > 0.5, value, images)

"""Guidance: the UNet rows that an image needs at each step, and how their predictions are combined.

Imports no torch at run time, so that the queue can count rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from models.conditioning.prompt_schedule import StepPrompts

if TYPE_CHECKING:
    from torch import Tensor

CONDITIONS = 2  # of a prompt and its negative prompt
UNCONDITIONAL, CONDITIONAL = range(CONDITIONS)
DEFAULT_IMAGE_GUIDANCE = 1.5  # scale of guidance by the image to edit (Brooks et al. 2023)
IMAGE = CONDITIONS  # of models that edit images: the negative prompt, with the image to edit


class StepRows(NamedTuple):
    """The UNet rows of one image in one step.

    rows: the condition of each row, by its index among the image's conditions; the first row is the base.
    weights: of the other rows, see guide(). rescale: phi of rescale(); the second row is the conditional one.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...] = ()
    rescale: float = 0.0


def cfg_rows(guidance_scale: float) -> StepRows:
    """The rows of classifier-free guidance.

    One row is enough at a scale of 0, the unconditional prediction, and of 1, the conditional one.
    """
    if guidance_scale in (0.0, 1.0):
        return StepRows((CONDITIONAL if guidance_scale else UNCONDITIONAL,))
    return StepRows((UNCONDITIONAL, CONDITIONAL), (guidance_scale,))


def edit_rows(guidance_scale: float, image_scale: float) -> StepRows:
    """The rows of guidance by a text and by the image to edit (Brooks et al. 2023, equation 3).

    The conditions are the negative prompt without the image, the prompt with it, and the negative prompt with
    it: e0 + image_scale * (e2 - e0) + guidance_scale * (e1 - e2). Rows that cancel out are left out.
    """
    if image_scale == guidance_scale:
        return cfg_rows(guidance_scale)
    if image_scale == 1.0:
        rows = StepRows((IMAGE, CONDITIONAL), (guidance_scale,))
        return rows if guidance_scale else StepRows((IMAGE,))
    if not guidance_scale:
        return StepRows((UNCONDITIONAL, IMAGE), (image_scale,))
    return StepRows((UNCONDITIONAL, CONDITIONAL, IMAGE), (guidance_scale, image_scale - guidance_scale))


def row_count(guidance_scale: float) -> int:
    """UNet rows that one image costs: 1 or 2."""
    return len(cfg_rows(guidance_scale).rows)


def cfg_run(
    guided: StepRows, calls: int, start: float = 0.0, end: float = 1.0, rescale: float = 0.0
) -> tuple[StepRows, ...]:
    """The rows of each of `calls` UNet calls: `guided` from the fraction `start` of the run to `end`.

    Outside, one conditional row is enough (Kynkäänniemi et al. 2024). The first guided call is number
    int(start * calls), counted from 0; the first one after them is number int(end * calls).
    """
    first, last = (int(part * calls + 1e-9) for part in (start, end))  # 0.58 of 50 is 29, not 28.999...
    inside, outside = guided._replace(rescale=rescale), cfg_rows(1.0)
    return tuple(inside if first <= call < last else outside for call in range(calls))


def composed(rows: StepRows, prompts: StepPrompts) -> StepRows:
    """Rows of classifier-free guidance for a composition: one conditional row for each of its parts.

    guidance: base + sum of scale * weight * (eps of a part - base), base the negative prompt's (Liu et al.
    2022, equation 11). A single part of weight 1 without guidance needs no other row.
    """
    if rows.rows == (UNCONDITIONAL,):
        return rows._replace(rows=(prompts.negative,))
    scale = rows.weights[0] if rows.weights else 1.0
    if not rows.weights and prompts.weights == (1.0,):
        return rows._replace(rows=prompts.positive)
    weights = tuple(scale * weight for weight in prompts.weights)
    return rows._replace(rows=(prompts.negative, *prompts.positive), weights=weights)


def guide(base: Tensor, weighted: Iterable[tuple[Tensor, Tensor | float]]) -> Tensor:
    """base + sum of weight * (eps - base) over the other rows.

    With the unconditional row as base and one conditional row this is classifier-free guidance (Ho and
    Salimans 2021, equation 6, with weight = 1 + w). base, eps: (B, C, h, w); weight: one number for all
    images, or (B,). -> (B, C, h, w).
    """
    out = base
    for eps, weight in weighted:
        factor = weight if isinstance(weight, (int, float)) else weight[:, None, None, None]
        out = out + factor * (eps - base)
    return out


def rescale(guided: Tensor, conditional: Tensor, phi: float, offset: Tensor | float = 0.0) -> Tensor:
    """Guided eps of one image whose UNet output has been brought nearer to the conditional row's contrast.

    Output is multiplied by phi * std(conditional output) / std(guided output) + 1 - phi (Lin et al. 2023,
    equations 15 and 16). guided, conditional: (C, h, w), eps = offset + factor * output with any factor: for
    a UNet that predicts v this differs from the same scaling of eps. -> (C, h, w).
    """
    conditional, output = conditional - offset, guided - offset
    return offset + (phi * conditional.std() / output.std() + 1 - phi) * output

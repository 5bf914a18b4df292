"""One step of several images of one group, which may belong to different jobs, in one UNet call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from models.adapters.controls import Rows
from models.networks.adapter_inputs import AdapterInputs, combined
from models.sampling.guidance import StepRows, guide, rescale
from models.sampling.step import blend_unmasked, step
from models.sampling.table import ALPHA, FRESH_NOISE, SIGMA, T
from models.transfer import upload
from service.device.controls import control_inputs, controlled_rows, reference_inputs
from service.device.graphs import Graphs
from service.device.phases import Phase
from service.device.state import ImageState, JobState
from service.device.unet_calls import UNetInputs, UNetRows, call_images


def advance(
    states: Sequence[JobState],
    images: Sequence[ImageState],
    size: int,
    graphs: Graphs | None = None,
    sizes: Sequence[int] = (),
) -> Tensor:
    """The states of I images of one group after their next step: (I, 1 + m, C, h, w).

    m is the longest sampler history among the images. All rows share one UNet call if they are at most
    `size`; every row is at its own timestep of its own plan. Rows that reuse deep features have a call of
    their own. sizes: rows of calls of control networks, and of UNet calls of a part of the rows, the
    last one at most; () for `size` alone. The work is queued on the device; this function does not wait.
    """
    state = stack_states(images)  # (I, 1 + m, C, h, w)
    x = state[:, 0]
    lines = [state.line(image) for state, image in zip(states, images, strict=True)]
    table = torch.from_numpy(np.stack(lines))  # (I, ...) float64: one line of Plan.coeffs per image
    coeffs = upload(table.float(), x.device)
    eps = predict(states, images, x, coeffs, size, graphs or Graphs(), sizes or (size,))
    state = step(state, eps, coeffs, draw_noise(images, table))
    keep_x_0(states, images, x, eps)
    state[:, 0] = apply_masks(states, images, state[:, 0], coeffs)
    return state


def stack_states(images: Sequence[ImageState]) -> Tensor:
    """The states of all images, shorter histories filled up with zeros: (I, 1 + m, C, h, w)."""
    longest = max(len(image.state) for image in images)
    return torch.stack([pad(image.state, (0, 0) * 3 + (0, longest - len(image.state))) for image in images])


def predict(
    states: Sequence[JobState],
    images: Sequence[ImageState],
    x: Tensor,
    coeffs: Tensor,
    size: int,
    graphs: Graphs,
    sizes: Sequence[int],
) -> Tensor:
    """Guided eps (I, C, h, w), float32, of x (I, C, h, w).

    size: rows of each UNet call; sizes: rows that a call of a control network, or of some of the rows, can
    have.
    """
    rows = [state.rows(image) for state, image in zip(states, images, strict=True)]
    image_of_row = [index for index, own in enumerate(rows) for _ in own.rows]
    bundle, device = states[0].phase(images[0]).bundle, x.device
    inputs = unet_inputs(states, images, rows, device)
    index = upload(torch.tensor(image_of_row), device)
    row_x, row_coeffs = x[index], coeffs[index]
    all_rows = Rows(row_x, row_coeffs[:, T], inputs.tokens, inputs.pooled)
    inputs = inputs._replace(adapters=adapter_inputs(states, images, rows, all_rows, sizes, graphs))
    if inputs.keys_values is not None:  # in place of the context, which only control networks read
        inputs = inputs._replace(tokens=None)
    lengths = [len(own.rows) for own in rows]
    uses = [state.deep_use(image) for state, image in zip(states, images, strict=True)]
    call_rows = UNetRows(row_x, row_coeffs, inputs)
    bundles = [state.phase(image).bundle for state, image in zip(states, images, strict=True)]
    eps = call_images(bundles, images, uses, lengths, call_rows, size, sizes, graphs)
    starts = list(accumulate(lengths[:-1], initial=0))
    guided = combine(eps, rows, starts)
    for image, (own, start) in enumerate(zip(rows, starts, strict=True)):
        if own.rescale and own.weights:  # one image at a time, so that its bits do not depend on the others
            assert bundle.denoiser is not None
            offset = bundle.denoiser.eps_offset(x[image], coeffs[image, SIGMA])
            guided[image] = rescale(guided[image], eps[start + 1], own.rescale, offset)
    return guided


def combine(eps: Tensor, rows: Sequence[StepRows], starts: Sequence[int]) -> Tensor:
    """Guided eps (I, C, h, w) of I images, from that of all their rows (R, C, h, w).

    starts: the first row of each image.
    """
    base = eps[upload(torch.tensor(starts), eps.device)]
    weighted = []
    # An image without a row of this number has its base there, with a weight of 0.
    for number in range(max(2, *(len(own.rows) for own in rows)) - 1):
        present = [number < len(own.weights) for own in rows]
        places = [start + (number + 1) * here for start, here in zip(starts, present, strict=True)]
        weights = [own.weights[number] if here else 0.0 for own, here in zip(rows, present, strict=True)]
        part = eps[upload(torch.tensor(places), eps.device)]
        weighted.append((part, upload(torch.tensor(weights), eps.device)))
    return guide(base, weighted)


def unet_inputs(
    states: Sequence[JobState], images: Sequence[ImageState], rows: Sequence[StepRows], device: torch.device
) -> UNetInputs:
    """The inputs of all rows of all images."""
    phases = [state.phase(image) for state, image in zip(states, images, strict=True)]
    contexts = [phase.context for phase in phases]
    unet_spec = phases[0].bundle.spec.unet
    noise_levels = guidance = None
    if unet_spec is not None and unet_spec.noise_levels:
        levels = [
            phase.outline.noise_level for phase, own in zip(phases, rows, strict=True) for _ in own.rows
        ]
        noise_levels = upload(torch.tensor(levels), device)
    if unet_spec is not None and unet_spec.guidance_width:
        scales = [
            state.job.embedded_guidance for state, own in zip(states, rows, strict=True) for _ in own.rows
        ]
        guidance = upload(torch.tensor(scales), device)
    return UNetInputs(
        select([None if context is None else context.tokens for context in contexts], rows),
        select([None if context is None else context.pooled for context in contexts], rows),
        select([image.concat for image in images], list(map(concat_rows, phases, rows))),
        noise_levels,
        guidance,
        keys_values=select_keys(phases, rows),
    )


def select_keys(phases: Sequence[Phase], rows: Sequence[StepRows]) -> Tensor | None:
    """The keys and values (R, 2, L, W) of the contexts of all rows; None without cross-attention."""
    parts = [
        part
        for phase, own in zip(phases, rows, strict=True)
        if phase.attended is not None
        for part in phase.attended.rows(own.rows)
    ]
    return torch.cat(parts) if parts else None


def concat_rows(phase: Phase, rows: StepRows) -> StepRows:
    """The rows as indices of the concat channels, which a composition has once for each kind of condition."""
    kinds = phase.outline.kinds
    return rows if kinds is None else rows._replace(rows=tuple(kinds[row] for row in rows.rows))


def adapter_inputs(
    states: Sequence[JobState],
    images: Sequence[ImageState],
    rows: Sequence[StepRows],
    all_rows: Rows,
    sizes: Sequence[int],
    graphs: Graphs,
) -> AdapterInputs | None:
    """What controls and reference images add to the call; None if no row has any."""
    pairs = list(zip(states, images, strict=True))
    kinds = [concat_rows(state.phase(image), own) for (state, image), own in zip(pairs, rows, strict=True)]
    controlled = controlled_rows([state.controls(image) for state, image in pairs], kinds)
    parts = control_inputs(controlled, all_rows, sizes, graphs)
    parts += reference_inputs([state.references(image) for state, image in pairs], kinds, all_rows.x.device)
    return combined(len(all_rows.x), parts)


def select(conditions: Sequence[Tensor | None], rows: Sequence[StepRows]) -> Tensor | None:
    """The rows (R, ...) of all images, of the conditions (N, ...) of each.

    None if they have none. Of a group, either all images have conditions or none has.
    """
    parts = [
        each[part]
        for each, own in zip(conditions, rows, strict=True)
        if each is not None
        for part in slices(own.rows)
    ]
    assert not parts or all(each is not None for each in conditions)
    return torch.cat(parts) if parts else None


def slices(indices: Sequence[int]) -> list[slice]:
    """The indices as few slices, which select views: (0, 1, 3) are 0:2 and 3:4."""
    runs: list[slice] = []
    for index in indices:
        if runs and runs[-1].stop == index:
            runs[-1] = slice(runs[-1].start, index + 1)
        else:
            runs.append(slice(index, index + 1))
    return runs


def draw_noise(images: Sequence[ImageState], table: Tensor) -> Tensor | None:
    """Noise (I, C, h, w), 0 for images whose sampler adds none at this step; None if no sampler does."""
    adds_noise = (table[:, FRESH_NOISE] != 0).tolist()
    if not any(adds_noise):
        return None
    draws = []
    for image, adds in zip(images, adds_noise, strict=True):
        if adds and image.noise is None:
            image.noise = torch.randn(image.x.shape, generator=image.generator)
        draws.append(image.noise if adds and image.noise is not None else torch.zeros(image.x.shape))
    return upload(torch.stack(draws), images[0].state.device)


def apply_masks(
    states: Sequence[JobState], images: Sequence[ImageState], x: Tensor, coeffs: Tensor
) -> Tensor:
    """x, in images with a mask with the noised input image outside the mask."""
    masked, zs, noises, masks = [], [], [], []
    for index, (state, image) in enumerate(zip(states, images, strict=True)):
        if state.mask is not None:
            assert state.z is not None
            assert image.start_noise is not None
            masked.append(index)
            zs.append(state.z)
            noises.append(image.start_noise)
            masks.append(state.mask)
    if not masked:
        return x
    index_tensor = upload(torch.tensor(masked), x.device)
    kept = blend_unmasked(
        x[index_tensor], torch.stack(zs), torch.stack(noises), torch.stack(masks), coeffs[index_tensor]
    )
    return x.index_copy(0, index_tensor, kept)


def keep_x_0(states: Sequence[JobState], images: Sequence[ImageState], x: Tensor, eps: Tensor) -> None:
    """Store x_0 = (x - sigma eps) / alpha of images that may be shown before their last step."""
    for index, (state, image) in enumerate(zip(states, images, strict=True)):
        if state.keeps_x_0:
            alpha, sigma = map(float, state.line(image)[ALPHA : SIGMA + 1])
            image.x_0 = (x[index] - sigma * eps[index]) / alpha

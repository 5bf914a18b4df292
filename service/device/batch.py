"""What is held of jobs on the device, and one step of any mix of their images in one UNet call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from models.conditioning.conditioner import Asked
from models.conditioning.prompts import Reading
from models.conditioning.text_encoder import Context
from models.latent_diffusion import Known, LatentDiffusion
from models.sampling.denoiser import guide
from models.sampling.samplers import Plan, keep, step
from service.device.graphs import Graphs
from service.device.select import upload
from service.engine.job import Job


@dataclass
class ImageState:
    """One image between two UNet calls."""

    state: Tensor  # (1 + memory, C, h, w) float32, on the device: x, and what its sampler remembers
    generator: torch.Generator  # on the CPU, so that a seed means the same everywhere
    beside: Tensor | None  # (1 or 2, C', h, w): what the UNet takes beside x, as the contexts
    first: Tensor | None  # (C, h, w), the noise that it started from, where a mask keeps asking for it
    done: int = 0  # lines of the plan behind it
    noise: Tensor | None = None  # drawn for the next line; a call that fails and runs again draws no other
    low: Tensor | None = None  # (3, h, w), of a tile that has not begun: beside will be made of it
    x_0: Tensor | None = None  # (C, h, w), what the last step took x for without its noise; for previews

    @property
    def x(self) -> Tensor:
        """(C, h, w): the latent itself."""
        return self.state[0]


@dataclass
class JobState:
    """What a job's images share, and the images."""

    job: Job
    bundle: LatentDiffusion
    plan: Plan
    contexts: Context | None  # of 1 or 2 rows: null context first where guidance needs both
    z: Tensor | None  # (C, h, w), the given picture's latent
    mask: Tensor | None  # (1, h, w), 1 where the run may paint; None where the UNet sees the mask itself
    images: list[ImageState]

    def previews(self, image: ImageState) -> bool:
        """Whether the image is to be shown after its next step."""
        every = self.job.preview_every
        return bool(every) and (image.done + 1) % every == 0


def pixels_of(job: Job) -> np.ndarray:
    """The job's own picture: (H, W, 3) uint8, smaller than what is made where it is to be enlarged."""
    scale = job.scale or 1
    return np.frombuffer(job.image, np.uint8).reshape(job.height // scale, job.width // scale, 3)


def painted(job: Job) -> np.ndarray:
    """(H, W) bool: where the job's picture is painted anew."""
    return np.frombuffer(job.mask, np.uint8).reshape(job.height, job.width) >= 128


def encode(bundle: LatentDiffusion, job: Job, device: torch.device) -> Tensor:
    """The job's own picture as a scaled latent (C, h, w)."""
    return bundle.encode(picture_of(job, device))[0]


def picture_of(job: Job, device: torch.device) -> Tensor:
    """The job's own picture, x (1, 3, H, W)."""
    x = torch.from_numpy(pixels_of(job).copy()).to(device, torch.float32).permute(2, 0, 1) / 127.5 - 1
    return x[None].contiguous()


def known_of(bundle: LatentDiffusion, job: Job, device: torch.device) -> Known:
    """What the mask keeps of the job's own picture, for a UNet that takes that."""
    return bundle.known(picture_of(job, device), torch.from_numpy(painted(job).copy()).to(device))


def asked_of(job: Job, cell: int) -> Asked:
    """What the job's pictures are to show; a label of its regions covers cell x cell pixels."""
    regions = None
    if job.regions:
        numbers = np.frombuffer(job.regions, np.uint16).astype(np.int64)
        regions = torch.from_numpy(numbers.reshape(job.height // cell, job.width // cell))
    size = (job.width, job.height)
    return Asked(job.prompt, job.negative_prompt, job.class_label, job.boxes, regions, size, reading_of(job))


def reading_of(job: Job) -> Reading:
    """How the job's prompts are read."""
    return Reading(job.prompt_weights, job.long_prompts == "chunk")


def latent_mask(job: Job, factor: int, device: torch.device) -> Tensor:
    """(1, h, w): 1 where any of the pixels that a cell covers is painted anew."""
    return max_pool2d(torch.from_numpy(painted(job)).float()[None], factor).to(device)


def advance(
    states: Sequence[JobState], images: Sequence[ImageState], size: int, graphs: Graphs | None = None
) -> Tensor:
    """The states of I images of one group after their next step, from UNet calls of `size` rows.

    All rows share one call where size is as large; every row is at its own timestep of its own plan. The
    device is given all of it at once: nothing here waits for it.
    -> (I, 1 + m, C, h, w), m the longest memory of all.
    """
    state = stacked(images)  # (I, 1 + m, C, h, w)
    x = state[:, 0]
    taken = [state.plan.lines[image.done] for state, image in zip(states, images, strict=True)]
    table = torch.from_numpy(np.stack(taken))  # (I, ...) float64, as in Plan
    lines = upload(table.float(), x.device)
    eps = predict(states, images, x, lines, size, graphs or Graphs())
    state = step(state, eps, lines, draw(images, table))
    look_ahead(states, images, x, eps)
    state[:, 0] = keep_known(states, images, state[:, 0], lines)
    return state


def stacked(images: Sequence[ImageState]) -> Tensor:
    """The states of images, those with a shorter memory filled up with zeros: (I, 1 + m, C, h, w)."""
    most = max(len(image.state) for image in images)
    return torch.stack([pad(image.state, (0, 0) * 3 + (0, most - len(image.state))) for image in images])


def predict(
    states: Sequence[JobState],
    images: Sequence[ImageState],
    x: Tensor,
    lines: Tensor,
    size: int,
    graphs: Graphs,
) -> Tensor:
    """Guided eps (I, C, h, w), float32; x: (I, C, h, w)."""
    rows = [index for index, state in enumerate(states) for _ in range(state.job.rows)]  # row -> image
    last = torch.tensor(rows).bincount().cumsum(0) - 1  # each image's conditional row
    first = last - torch.tensor([state.job.rows - 1 for state in states])  # no guidance: the same
    bundle, device = states[0].bundle, x.device
    contexts = [state.contexts or Context(None) for state in states]
    told = Told(
        together([context.tokens for context in contexts]),
        together([context.pooled for context in contexts]),
        together([image.beside for image in images]),
        upload(torch.tensor([states[index].job.noise_level for index in rows]), device)
        if bundle.spec.unet.noise_levels
        else None,
    )
    index = upload(torch.tensor(rows), device)
    calls = [
        call(bundle, x[index[part]], lines[index[part]], told.rows(part), size, graphs)
        for part in (slice(begin, begin + size) for begin in range(0, len(rows), size))
    ]
    eps = torch.cat(calls)  # (R, C, h, w)
    scale = upload(torch.tensor([float(state.job.guidance_scale) for state in states]), device)
    return guide(eps[upload(first, device)], eps[upload(last, device)], scale)


class Told(NamedTuple):
    """What the UNet is told of each row beside x and t; None: nothing of that kind."""

    tokens: Tensor | None  # (R, L, C)
    pooled: Tensor | None  # (R, P)
    beside: Tensor | None  # (R, C', h, w)
    noise_levels: Tensor | None  # (R,)

    def rows(self, part: slice) -> Told:
        return Told(*(None if told is None else told[part] for told in self))

    def padded(self, count: int) -> Told:
        return Told(*(None if told is None else padded(told, count) for told in self))


def together(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of all in one, where they have any: all do or none does."""
    return None if parts[0] is None else torch.cat(list(parts))


def call(bundle: LatentDiffusion, x: Tensor, lines: Tensor, told: Told, size: int, graphs: Graphs) -> Tensor:
    """THE UNet call: eps (R, C, h, w) of R rows, padded to `size` with copies of the first."""
    count, padding = len(x), size - len(x)
    x, lines, told = padded(x, padding), padded(lines, padding), told.padded(padding)
    t, level = lines[:, 0], lines[:, 1:3]
    eps = graphs.run(
        bundle.unet, bundle.denoiser, x, t, told.tokens, told.pooled, told.beside, level, told.noise_levels
    )
    return eps[:count]


def padded(rows: Tensor, padding: int) -> Tensor:
    """With so many copies of the first row at the end."""
    return torch.cat([rows, rows[:1].expand(padding, *rows.shape[1:])])


def draw(images: Sequence[ImageState], table: Tensor) -> Tensor | None:
    """One draw from each image's generator whose line asks for it: (I, C, h, w); None if none does."""
    asks = (table[:, 3] != 0).tolist()
    if not any(asks):
        return None
    for image, ask in zip(images, asks, strict=True):
        if ask and image.noise is None:
            image.noise = torch.randn(image.x.shape, generator=image.generator)
    none = torch.zeros(images[0].x.shape)
    draws = [image.noise if ask else none for image, ask in zip(images, asks, strict=True)]
    return upload(torch.stack(draws), images[0].state.device)


def keep_known(states: Sequence[JobState], images: Sequence[ImageState], x: Tensor, lines: Tensor) -> Tensor:
    """Put back what is known in the images that have a mask."""
    masked = [index for index, state in enumerate(states) if state.mask is not None]
    if not masked:
        return x
    z = torch.stack([states[index].z for index in masked])
    noise = torch.stack([images[index].first for index in masked])
    mask = torch.stack([states[index].mask for index in masked])
    index = upload(torch.tensor(masked), x.device)
    return x.index_copy(0, index, keep(x[index], z, noise, mask, lines[index]))


def look_ahead(states: Sequence[JobState], images: Sequence[ImageState], x: Tensor, eps: Tensor) -> None:
    """Note x_0 = (x - sigma eps) / alpha of images that are to be shown."""
    for index, (state, image) in enumerate(zip(states, images, strict=True)):
        if state.previews(image):
            alpha, sigma = map(float, state.plan.lines[image.done, 1:3])
            image.x_0 = (x[index] - sigma * eps[index]) / alpha

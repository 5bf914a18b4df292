"""The state of running jobs and of their images."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.sampling.guidance import StepRows
from models.sampling.schedule import Floats
from service.device.controls import ControlUse, ReferenceUse
from service.device.phases import Phase
from service.engine.job import Job


class DeepUse(NamedTuple):
    """A step of an image that reuses the deep features of a branch, or else keeps them."""

    branch: int
    reuses: bool


@dataclass
class ImageState:
    """One image (or one tile of an image to enlarge) between two UNet calls."""

    state: Tensor  # (1 + memory, C, h, w) float32, on the device: x, then the sampler's history
    generator: torch.Generator  # on the CPU, so that a seed gives the same noise for every device
    concat: (
        Tensor | None
    )  # (N, C', h, w): concat channels of the UNet, for each condition as in Phase.context
    start_noise: Tensor | None  # (C, h, w), if a mask is applied after each step
    phase: int = 0  # index of the current phase
    done: int = 0  # steps taken in the current phase
    noise: Tensor | None = None  # drawn for the next step; kept until it succeeds, so that a retry reuses it
    low: Tensor | None = None  # (3, h, w): low-resolution pixels of a tile, until `concat` is made from them
    pixels: NDArray[np.uint8] | None = None  # (H, W, 3): the image to encode, or that whose tiles run
    tiles: TileRun | None = None  # in the phase of an upscaling model
    x_0: Tensor | None = None  # (C, h, w), the last step's prediction of the final latent; see keeps_x_0
    deep: Tensor | None = None  # (k, C, h, w): deep features of its k rows, in a phase with a feature cache

    @property
    def x(self) -> Tensor:
        """(C, h, w): the latent itself."""
        return self.state[0]


@dataclass
class TileRun:
    """The tiles of an image: those to come, latents with their concat channels, and pixels (H, W, 3)."""

    waiting: deque[ImageState]
    latents: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)


@dataclass
class JobState:
    """The state of a job: what its images share, and the images."""

    job: Job
    phases: tuple[Phase, ...]
    z: Tensor | None = None  # (C, h, w), the latent of the input image
    mask: Tensor | None = None  # (1, h, w), 1 marks cells to repaint; None for models with mask channels
    images: list[ImageState] = field(default_factory=list)

    @property
    def bundle(self) -> LatentDiffusion:
        """The model that encodes the job's images and decodes them."""
        return self.phases[0].bundle

    def next_phase(self, image: ImageState) -> Phase:
        """The phase after the current one of an image."""
        return self.phases[image.phase + 1]

    def phase(self, image: ImageState) -> Phase:
        """The current phase of an image."""
        return self.phases[image.phase]

    def line(self, image: ImageState) -> Floats:
        """The line of the plan for the image's next step."""
        line: Floats = self.phase(image).plan.coeffs[image.done]
        return line

    def rows(self, image: ImageState) -> StepRows:
        """The UNet rows of the image's next step."""
        return self.phase(image).outline.rows[image.done]

    def controls(self, image: ImageState) -> tuple[ControlUse, ...]:
        """The controls that act at the image's next step."""
        return self.phase(image).controls_at(image.done)

    def references(self, image: ImageState) -> tuple[ReferenceUse, ...]:
        """The reference images that act at the image's next step."""
        return self.phase(image).references_at(image.done)

    def deep_use(self, image: ImageState) -> DeepUse | None:
        """How the image's next step uses deep features; None if it neither keeps nor reuses them."""
        outline, call = self.phase(image).outline, image.done
        if outline.cache is None:
            return None
        reuses, next_reuses = (*outline.reuses, False)[call : call + 2]
        return DeepUse(outline.cache.branch, reuses) if reuses or next_reuses else None

    @property
    def keeps_x_0(self) -> bool:
        """Whether images may be shown before their last step: in previews, or after an interrupt."""
        return bool(self.job.preview_every)

    def ends_phase(self, image: ImageState) -> bool:
        """Whether the image has had the last step of its phase."""
        return image.done == len(self.phase(image))

    def is_denoised(self, image: ImageState) -> bool:
        """Whether the image has had its last step."""
        return image.phase == len(self.phases) - 1 and self.ends_phase(image)

    def latent_of(self, image: ImageState) -> Tensor:
        """(C, h, w), to decode: the latent, or before the last step the prediction of the final latent."""
        return image.x if image.x_0 is None or self.is_denoised(image) else image.x_0

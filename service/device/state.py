"""The state of running jobs and of their images."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.conditioning.text_encoder import Context
from models.latent_diffusion import LatentDiffusion
from models.sampling.table import Plan
from service.engine.job import Job


@dataclass
class ImageState:
    """One image (or one tile of an image to enlarge) between two UNet calls."""

    state: Tensor  # (1 + memory, C, h, w) float32, on the device: x, then the sampler's history
    generator: torch.Generator  # on the CPU, so that a seed gives the same noise for every device
    concat: (
        Tensor | None
    )  # (1 or 2, C', h, w): concat channels of the UNet; rows as those of JobState.context
    start_noise: Tensor | None  # (C, h, w), if a mask is applied after each step
    done: int = 0  # steps taken
    noise: Tensor | None = None  # drawn for the next step; kept until it succeeds, so that a retry reuses it
    low: Tensor | None = None  # (3, h, w): low-resolution pixels of a tile, until `concat` is made from them
    x_0: Tensor | None = None  # (C, h, w), the last step's prediction of the final latent; see keeps_x_0

    @property
    def x(self) -> Tensor:
        """(C, h, w): the latent itself."""
        return self.state[0]


@dataclass
class JobState:
    """The state of a job: what its images share, and the images."""

    job: Job
    group: Hashable  # of Shape: jobs with equal groups may share a UNet call
    bundle: LatentDiffusion
    plan: Plan
    context: Context | None  # 1 or 2 rows; with guidance the unconditional one first
    z: Tensor | None = None  # (C, h, w), the latent of the input image
    mask: Tensor | None = None  # (1, h, w), 1 marks cells to repaint; None for models with mask channels
    images: list[ImageState] = field(default_factory=list)

    @property
    def keeps_x_0(self) -> bool:
        """Whether images may be shown before their last step: in previews, or after an interrupt."""
        return bool(self.job.preview_every)

    def latent_of(self, image: ImageState) -> Tensor:
        """(C, h, w), to decode: the latent, or before the last step the prediction of the final latent."""
        return image.x if image.x_0 is None or image.done == len(self.plan) else image.x_0

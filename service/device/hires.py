"""The second pass at a larger size: the image of the first is enlarged, and noise is added."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from models.transfer import upload
from models.upscalers import IMAGE_UPSCALERS, LATENT_UPSCALERS, covering_size
from service.device.inputs import initial_noise, to_x, with_history
from service.device.state import ImageState, JobState

Pixels = NDArray[np.uint8]


def enlarged_latent(state: JobState, image: ImageState) -> Tensor:
    """The latent of an image, interpolated to the size of its next phase: (C, h, w)."""
    outline, spec = state.next_phase(image).outline, state.bundle.spec
    upscaler = LATENT_UPSCALERS[outline.upscaler]
    _, h, w = spec.latent_shape(*covering(state))
    z = interpolate(image.x[None], (h, w), mode=upscaler.mode, antialias=upscaler.antialias)[0]
    _, high, wide = spec.latent_shape(outline.width, outline.height)
    top, left = (h - high) // 2, (w - wide) // 2
    return z[:, top : top + high, left : left + wide].contiguous()


def enlarged_pixels(state: JobState, image: ImageState, pixels: Pixels) -> Pixels:
    """The decoded image of a phase (H, W, 3), resampled to the size of the next one."""
    outline = state.next_phase(image).outline
    wide, high = covering(state)
    resampled = Image.fromarray(pixels).resize((wide, high), IMAGE_UPSCALERS[outline.upscaler])
    left, top = (wide - outline.width) // 2, (high - outline.height) // 2
    return np.asarray(resampled.crop((left, top, left + outline.width, top + outline.height)))


def covering(state: JobState) -> tuple[int, int]:
    """The size to which the image is enlarged before it is cropped: (width, height)."""
    return covering_size((state.job.width, state.job.height), state.job.size)


def begin(state: JobState, index: int, z: Tensor) -> None:
    """Let image `index` begin its next phase, image-to-image from z (C, h, w).

    Its noise is that of its seed at the new size, as if the image were a request of its own.
    """
    phase, bundle = state.next_phase(state.images[index]), state.bundle
    generator = torch.Generator().manual_seed(state.job.image_seed(index))
    noise = upload(initial_noise(state.job, index, tuple(z.shape), generator), z.device)
    signal, sigma = phase.plan.start
    x = with_history(signal * z + sigma * noise, phase.plan)
    concat = bundle.concat_channels(*z.shape[1:])
    state.images[index] = ImageState(x, generator, concat, None, state.images[index].phase + 1, x_0=z)


def resized_to(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """An image of another size (H, W, 3) at (width, height): of a job that ended before its second pass."""
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def encoded(state: JobState, pixels: Pixels) -> Tensor:
    """The scaled latent (C, h, w) of an image (H, W, 3)."""
    return state.bundle.encode(to_x(pixels, state.bundle.device))[0]

"""From a job's bytes and texts to tensors, and the initial latents of its images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from models.adapters.controls import Control, masked
from models.adapters.image_encoder import ImageEncoder
from models.adapters.ip_adapter import ReferenceAdapter
from models.conditioning.conditioner import ConditioningInput
from models.conditioning.prompts import PromptOptions
from models.latent_diffusion import LatentDiffusion, MaskedImage
from models.sampling.noise import slerp
from models.sampling.table import Plan
from models.transfer import upload
from service.device.controls import ControlUse, ReferenceUse
from service.device.phases import PhaseOutline
from service.device.state import ImageState, JobState
from service.engine.job import Job, JobControl, JobReference

TILE_SEED_STEP = 2**53  # difference between the noise seeds of two tiles of an image
MASK_THRESHOLD = 128  # pixels with this mask value or a larger one are repainted


def pixels_of(job: Job) -> np.ndarray:
    """The job's input image, (H, W, 3) uint8; for upscaling the small image."""
    scale = job.scale or 1
    return np.frombuffer(job.image, np.uint8).reshape(job.height // scale, job.width // scale, 3)


def masked_pixels(job: Job) -> np.ndarray:
    """(H, W) bool: the pixels to repaint."""
    return np.frombuffer(job.mask, np.uint8).reshape(job.height, job.width) >= MASK_THRESHOLD


def image_of(job: Job, device: torch.device) -> Tensor:
    """The job's input image x (1, 3, H, W) in [-1, 1]."""
    return to_x(pixels_of(job), device)


def to_x(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Pixels (H, W, 3) uint8 -> x (1, 3, H, W) in [-1, 1]."""
    x = upload(torch.from_numpy(pixels.copy()), device).float().permute(2, 0, 1) / 127.5 - 1
    return x[None].contiguous()


def encode(bundle: LatentDiffusion, job: Job, device: torch.device) -> Tensor:
    """The job's input image as a scaled latent (C, h, w)."""
    return bundle.encode(image_of(job, device))[0]


def masked_image(bundle: LatentDiffusion, job: Job, device: torch.device) -> MaskedImage:
    """The input image without the pixels to repaint, for a UNet with concat channels for it."""
    repaint = torch.from_numpy(masked_pixels(job).copy())
    return bundle.encode_masked(image_of(job, device), upload(repaint, device))


def latent_mask(job: Job, factor: int, device: torch.device) -> Tensor:
    """(1, h, w): 1 where a latent cell covers at least one pixel to repaint."""
    return upload(max_pool2d(torch.from_numpy(masked_pixels(job)).float()[None], factor), device)


def start_control(
    job: Job,
    own: JobControl,
    control: Control,
    size: tuple[int, int],
    device: torch.device,
) -> ControlUse:
    """A control of a job, with its image prepared for images of `size` (width, height)."""
    x = unit_pixels(own.image, job.width, job.height, device)
    if own.masked:
        mask = upload(torch.from_numpy(masked_pixels(job)), device)[None, None].float()
        x = masked(control, x, mask)
    if size != (job.width, job.height):
        x = interpolate(x, (size[1], size[0]), mode="bicubic", antialias=True)
    prepared = control.prepare(x)
    return ControlUse(control, prepared, own.scale, own.start, own.end, own.mode, own.type)


def start_reference(own: JobReference, adapter: ReferenceAdapter, device: torch.device) -> ReferenceUse:
    """A reference image of a job, with its tokens' keys and values."""
    keys, values = adapter.prepare(unit_pixels(own.image, own.width, own.height, device))
    return ReferenceUse(keys, values, own.scale, own.start, own.end)


def neighbours(job: Job, encoder: ImageEncoder, device: torch.device) -> Tensor:
    """The vectors (k, P) of the job's reference images, for its context."""
    references = [unit_pixels(own.image, own.width, own.height, device) for own in job.references]
    return torch.cat([encoder.neighbours(x) for x in references])


def unit_pixels(image: bytes, width: int, height: int, device: torch.device) -> Tensor:
    """height x width x 3 bytes -> (1, 3, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.frombuffer(image, np.uint8).reshape(height, width, 3).copy())
    return (upload(pixels, device).permute(2, 0, 1)[None].float() / 255).contiguous()


def conditioning_input(job: Job, outline: PhaseOutline, cell: int) -> ConditioningInput:
    """The prompts, labels, boxes and regions of a phase; a label of the regions covers cell x cell pixels."""
    regions = None
    if job.regions:
        numbers = np.frombuffer(job.regions, np.uint16).astype(np.int64)
        regions = torch.from_numpy(numbers.reshape(job.height // cell, job.width // cell))
    return ConditioningInput(
        outline.prompt,
        outline.negative_prompt,
        job.class_label,
        job.boxes,
        regions,
        (outline.width, outline.height),
        prompt_options(job),
        composition=outline.composition,
    )


def prompt_options(job: Job) -> PromptOptions:
    """How the job's prompts are tokenized."""
    a1111 = job.prompt_syntax == "a1111"
    chunked = a1111 or job.long_prompts == "chunk"
    return PromptOptions(a1111 or job.prompt_weights, chunked, job.clip_skip, breaks=a1111)


def start_images(state: JobState) -> None:
    """Add the initial states of the images: noise, or the input image with noise added."""
    job, bundle, spec = state.job, state.bundle, state.bundle.spec
    device, shape = bundle.device, spec.latent_shape(job.width, job.height)
    masked = masked_image(bundle, job, device) if job.mask and spec.mask_channels else None
    # A UNet with channels for the image starts from noise alone at full strength, as in its training.
    edited = bundle.encode_edited(image_of(job, device)) if job.image and spec.edits else None
    if job.image and not ((masked or spec.edits) and job.strength == 1.0):
        state.z = encode(bundle, job, device)
    if job.mask and not masked:
        state.mask = latent_mask(job, spec.autoencoder.factor, device)
    conditioning = conditioning_input(job, state.phases[0].outline, spec.label_cell)
    concat = bundle.concat_channels(*shape[1:], conditioning.regions, masked, edited)
    plan = state.phases[0].plan
    signal, sigma = plan.start
    fill_mask = latent_mask(job, spec.autoencoder.factor, device) if job.latent_fill != "image" else None
    for index in range(job.n):
        generator = torch.Generator().manual_seed(job.image_seed(index))
        noise = upload(initial_noise(job, index, shape, generator), device)
        z = state.z
        if z is not None and fill_mask is not None:
            z = (1 - fill_mask) * z + (fill_mask * noise if job.latent_fill == "noise" else 0)
        x = noise if z is None else signal * z + sigma * noise
        start_noise = None if state.mask is None else noise
        state.images.append(ImageState(with_history(x, plan), generator, concat, start_noise))


def initial_noise(job: Job, index: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The noise that image `index` starts from, drawn from its generator; with a job's variation mixed in."""
    noise = torch.randn(shape, generator=generator)
    if job.variation is None:
        return noise
    other = torch.Generator().manual_seed(job.variation.seed + index)
    return slerp(job.variation.strength, noise, torch.randn(shape, generator=other))


def with_history(x: Tensor, plan: Plan) -> Tensor:
    """x (C, h, w) with empty room for the sampler's history: (1 + memory, C, h, w)."""
    return torch.cat([x[None], torch.zeros(plan.history, *x.shape, device=x.device)])

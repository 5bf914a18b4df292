"""The phase of an upscaling model between two passes: the image's tiles run one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.sampling.table import Plan
from models.tiles import Tiles, cut, merge
from service.device.inputs import TILE_SEED_STEP, image_of, to_x, with_history
from service.device.state import ImageState, JobState, TileRun


def tile_states(
    bundle: LatentDiffusion, low: Tensor, tiles: Tiles, seed: int, noise_level: int, plan: Plan
) -> Iterator[ImageState]:
    """The initial states of the tiles of an image to enlarge, low (3, h, w).

    Each tile gets its part of the noise of the whole image, and of the low-resolution image.
    """
    noise, noised = bundle.start_upscaling(low, seed, noise_level)
    for tile in range(len(tiles.corners)):
        rows, columns = tiles.slices(tile)
        generator = torch.Generator().manual_seed((seed + tile * TILE_SEED_STEP) % 2**64)
        x = with_history(noise[:, rows, columns], plan)
        yield ImageState(x, generator, None, None, low=noised[:, rows, columns])


def start_tiles(state: JobState) -> None:
    """Add the initial states of the tiles of a job's image to enlarge: all are images of the job."""
    job, bundle = state.job, state.bundle
    low = image_of(job, bundle.device)[0]
    tiles = cut(low.shape[1], low.shape[2], bundle.spec.tile)
    for index in range(job.n):
        seed = job.seed + index
        state.images += tile_states(bundle, low, tiles, seed, job.noise_level, state.phases[0].plan)


def begin(state: JobState, index: int, pixels: np.ndarray) -> None:
    """Let image `index` begin its next phase with the tiles of the decoded image `pixels` (H, W, 3)."""
    image = state.images[index]
    phase = state.next_phase(image)
    outline, tiles = phase.outline, phase.outline.tiles
    assert tiles is not None
    height, width = (last + size for last, size in zip(tiles.corners[-1], tiles.size, strict=True))
    missing = ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0))
    low = to_x(np.pad(pixels, missing, mode="edge"), phase.bundle.device)[0]
    seed = state.job.seed + index
    first, *others = tile_states(phase.bundle, low, tiles, seed, outline.noise_level, phase.plan)
    state.images[index] = replace(first, phase=image.phase + 1, pixels=pixels, tiles=TileRun(deque(others)))


def after_step(state: JobState, image: ImageState) -> None:
    """After the last step of a tile, put the next one in its place."""
    outline, tiles = state.phase(image).outline, image.tiles
    if (
        tiles is None
        or outline.tiles is None
        or image.done % (len(outline.plan) // len(outline.tiles.corners))
    ):
        return
    assert image.concat is not None
    tiles.latents.append((image.x, image.concat))
    if tiles.waiting:
        tile = tiles.waiting.popleft()
        image.state, image.generator = tile.state, tile.generator
        image.concat, image.low = tile.concat, tile.low


def merged(state: JobState, image: ImageState, tiles: TileRun) -> np.ndarray:
    """The enlarged image (H, W, 3) uint8, from the decoded tiles."""
    phase = state.phase(image)
    assert phase.outline.tiles is not None
    assert image.pixels is not None
    factor = phase.bundle.spec.autoencoder.factor
    whole = merge(tiles.pixels, phase.outline.tiles, factor).round().astype(np.uint8)
    height, width = (factor * side for side in image.pixels.shape[:2])
    return whole[:height, :width]

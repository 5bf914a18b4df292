"""Evaluation of an upscaler: its gain over bicubic resampling, and whether its tiles are visible."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from models.latent_diffusion import LatentDiffusion
from models.tiles import cut
from models.training.crops import SCALE, dead_leaves, draw_text, larger, smaller, texture
from models.training.evaluate import Images, psnr, reconstructed, shuffled, to_images
from models.training.first_stage import to_x
from models.training.scenes import SIZE, Atlas, Floats, Pixels, draw_scene, held_out_scenes

TEST_SEED = 1_000_003  # of test images; training never uses this seed
BATCH = 32  # images enlarged at once


@torch.inference_mode()
def enlarge(model: LatentDiffusion, low: Images, steps: int, noise_level: int = 0) -> Images:
    """Upscales images (B, h, w, 3) -> (B, 4h, 4w, 3), image i with seed i."""
    parts = []
    for start in range(0, len(low), BATCH):
        part = low[start : start + BATCH]
        x = to_x(torch.from_numpy(part)).to(model.device)
        seeds = range(start, start + len(part))
        parts.append(to_images(model.upscale(x, seeds, steps, noise_level)))
    return np.concatenate(parts)


def test_sets(count: int) -> dict[str, Images]:
    """Sharp images outside the training data; all scenes are over every glyph.

    Dead leaves, text and textures (gradients with noise) stand for photographs.
    """
    rng, atlas = np.random.default_rng(TEST_SEED), Atlas()
    return {
        "held-out scenes": np.stack([scene.image for scene in held_out_scenes(atlas, count)]),
        "mixed scenes": np.stack([draw_scene(atlas, rng).image for _ in range(count)]),
        "dead leaves": np.stack([dead_leaves(rng) for _ in range(count)]),
        "text": np.stack([draw_text(rng) for _ in range(count)]),
        "textures": np.stack([texture(rng, SIZE) for _ in range(count)]),
    }


def gains(made: Images, baseline: Images, reference: Images) -> Floats:
    """How much nearer to the reference each image is than its baseline, in dB of PSNR: (B,)."""
    images = zip(made, baseline, reference, strict=True)
    return np.array([psnr(ours, sharp) - psnr(other, sharp) for ours, other, sharp in images])


def collage(rows: int, columns: int) -> Pixels:
    """One large image of held-out scenes side by side."""
    scenes = [scene.image for scene in held_out_scenes(Atlas(), rows * columns, seed=7)]
    lines = [np.hstack(scenes[row * columns :][:columns]) for row in range(rows)]
    return np.vstack(lines)


def seams(image: Pixels, reference: Pixels, corners: list[int]) -> float:
    """How visible tiles are: the error's jump between neighbouring columns where a tile begins.

    Relative to the mean jump between any two neighbouring columns. corners: first columns of tiles.
    """
    error = image.astype(np.float64) - reference
    jumps = np.abs(np.diff(error, axis=1)).mean(axis=(0, 2))
    return float(jumps[[corner - 1 for corner in corners]].mean() / jumps.mean())


def report(model: LatentDiffusion, count: int, steps: int) -> Iterator[str]:
    """Yields one line per figure; reproducible on the same hardware."""
    sets = test_sets(count)
    for name, images in sets.items():
        yield f"D(E(x)) on {count} {name}: {psnr(reconstructed(model, images), images):.2f} dB"
    for name, images in sets.items():
        low = smaller(images)
        bicubic, made = larger(low), enlarge(model, low, steps)
        gain = gains(made, bicubic, images)
        yield (
            f"{SIZE // SCALE} -> {SIZE} on {count} {name}, {steps} steps: {psnr(made, images):.2f} dB, "
            f"bicubic {psnr(bicubic, images):.2f} dB; gain of each image: median {np.median(gain):+.2f} dB, "
            f"from {gain.min():+.2f} to {gain.max():+.2f} dB"
        )
    large = collage(3, 5)[40:296, 40:552]  # cropped so that no scene ends where a tile begins
    low = smaller([large])
    made = enlarge(model, low, steps)[0]
    columns = sorted(
        {SCALE * left for _, left in cut(low.shape[1], low.shape[2], model.spec.tile).corners} - {0}
    )
    yield (
        f"{low.shape[2]}x{low.shape[1]} by tiles: {psnr(made, large):.2f} dB, "
        f"bicubic {psnr(larger(low)[0], large):.2f} dB; "
        f"jumps where tiles begin {seams(made, large, columns):.2f} of the average"
    )
    images = sets["held-out scenes"]
    baseline = enlarge(shuffled(model), smaller(images), steps)
    yield f"the same with the UNet's weights shuffled: {psnr(baseline, images):.2f} dB"


def sheets(model: LatentDiffusion, steps: int) -> Iterator[tuple[str, Image.Image]]:
    """Sheets of the input, bicubic resampling, the model and the original; one of an image in tiles."""
    from models.training.sheet import COLUMNS, lay_out

    for name, images in test_sets(COLUMNS).items():
        low = smaller(images)
        shown = low.repeat(SCALE, 1).repeat(SCALE, 2)
        rows = [shown, larger(low), enlarge(model, low, steps), images]
        captions = ["32x32", "bicubic", "enlarged", "original"]
        texts = [text for text in captions for _ in range(COLUMNS)]
        yield name.replace(" ", "-"), lay_out(np.concatenate(rows), texts, COLUMNS)
    low = smaller([collage(2, 3)])
    yield (
        "tiles",
        lay_out(np.concatenate([larger(low), enlarge(model, low, steps)]), ["bicubic", "enlarged"], 2),
    )

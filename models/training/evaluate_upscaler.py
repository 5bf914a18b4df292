"""Does an upscaler show more than resampling does, and can its tiles be seen?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from models.latent_diffusion import LatentDiffusion
from models.tiles import cut
from models.training.crops import SCALE, dead_leaves, larger, smaller
from models.training.evaluate import Pictures, psnr, reconstructed, shuffled, to_pictures
from models.training.first_stage import to_x
from models.training.scenes import SIZE, Atlas, held_out_scenes

SEED = 1_000_003  # of pictures that no training drew
BATCH = 32


@torch.inference_mode()
def enlarge(bundle: LatentDiffusion, low: Pictures, steps: int, noise_level: int = 0) -> Pictures:
    """Picture i with seed i."""
    parts = []
    for start in range(0, len(low), BATCH):
        part = low[start : start + BATCH]
        x = to_x(torch.from_numpy(part)).to(bundle.device)
        seeds = range(start, start + len(part))
        parts.append(to_pictures(bundle.upscale(x, seeds, steps, noise_level)))
    return np.concatenate(parts)


def test_sets(count: int) -> dict[str, Pictures]:
    """Sharp pictures that were not trained on: held-out scenes, and dead leaves for photographs."""
    rng = np.random.default_rng(SEED)
    return {
        "held-out scenes": np.stack([scene.picture for scene in held_out_scenes(Atlas(), count)]),
        "dead leaves": np.stack([dead_leaves(rng) for _ in range(count)]),
    }


def collage(rows: int, columns: int) -> np.ndarray:
    """Held-out scenes side by side, one picture, uint8."""
    scenes = [scene.picture for scene in held_out_scenes(Atlas(), rows * columns, seed=7)]
    lines = [np.hstack(scenes[row * columns :][:columns]) for row in range(rows)]
    return np.vstack(lines)


def seams(picture: np.ndarray, reference: np.ndarray, corners: list[int]) -> float:
    """The error's jump from a column to the next where tiles begin, over that of all columns."""
    error = picture.astype(np.float64) - reference
    jumps = np.abs(np.diff(error, axis=1)).mean(axis=(0, 2))
    return float(jumps[[corner - 1 for corner in corners]].mean() / jumps.mean())


def report(bundle: LatentDiffusion, count: int, steps: int) -> Iterator[str]:
    """One sentence for each figure, as it is known; reproducible on the same hardware."""
    sets = test_sets(count)
    for name, pictures in sets.items():
        yield f"D(E(x)) on {count} {name}: {psnr(reconstructed(bundle, pictures), pictures):.2f} dB"
    for name, pictures in sets.items():
        low = smaller(pictures)
        bicubic, made = psnr(larger(low), pictures), psnr(enlarge(bundle, low, steps), pictures)
        yield (
            f"{SIZE // SCALE} -> {SIZE} on {count} {name}, {steps} steps: {made:.2f} dB, "
            f"bicubic {bicubic:.2f} dB, {made - bicubic:+.2f} dB"
        )
    large = collage(3, 5)[40:296, 40:552]  # no scene ends where a tile begins
    low = smaller([large])
    made = enlarge(bundle, low, steps)[0]
    columns = sorted({SCALE * left for _, left in cut(*low.shape[1:3], bundle.spec.tile).corners} - {0})
    yield (
        f"{low.shape[2]}x{low.shape[1]} by tiles: {psnr(made, large):.2f} dB, "
        f"bicubic {psnr(larger(low)[0], large):.2f} dB; "
        f"jumps where tiles begin {seams(made, large, columns):.2f} of the average"
    )
    pictures = sets["held-out scenes"]
    nothing = enlarge(shuffled(bundle), smaller(pictures), steps)
    yield f"the same with the UNet's weights shuffled: {psnr(nothing, pictures):.2f} dB"


def sheets(bundle: LatentDiffusion, steps: int) -> Iterator[tuple[str, Image.Image]]:
    """What goes in, bicubic, ours and the original: of small pictures, and of one in tiles."""
    from models.training.sheet import COLUMNS, lay_out

    for name, pictures in test_sets(COLUMNS).items():
        low = smaller(pictures)
        shown = low.repeat(SCALE, 1).repeat(SCALE, 2)
        rows = [shown, larger(low), enlarge(bundle, low, steps), pictures]
        captions = ["32x32", "bicubic", "enlarged", "original"]
        texts = [text for text in captions for _ in range(COLUMNS)]
        yield name.replace(" ", "-"), lay_out(np.concatenate(rows), texts, COLUMNS)
    low = smaller([collage(2, 3)])
    yield (
        "tiles",
        lay_out(np.concatenate([larger(low), enlarge(bundle, low, steps)]), ["bicubic", "enlarged"], 2),
    )

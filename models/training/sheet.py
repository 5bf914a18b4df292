"""Sheets of captioned pictures, one for each task, the same for everyone who makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.latent_diffusion import LatentDiffusion
from models.training.evaluate import Painter, Pictures, held_out_prompts, object_holes, to_pictures
from models.training.scenes import COLOURS, SIZE, Atlas, caption_of, held_out_scenes

CAPTION = 46  # pixels below each picture, for three lines
LINE = 22  # characters
GAP = 8
COLUMNS = 6
WIDE = ((192, 128), (256, 128))  # larger than anything in training

Captioned = tuple[Pictures, Sequence[str]]


def sheets(bundle: LatentDiffusion, names: Sequence[str]) -> Iterator[tuple[str, Image.Image]]:
    """(task, sheet) for all that the model in the box does; nothing is chosen by hand."""
    defaults = bundle.spec.defaults
    paint = Painter(bundle, defaults.steps, defaults.guidance_scale, total=10 * COLUMNS)
    yield "text-to-image", lay_out(*of_prompts(paint, names), COLUMNS)
    yield "layout-to-image", lay_out(*of_layouts(paint, names), COLUMNS)
    yield "inpainting", lay_out(*of_holes(paint, names), COLUMNS)
    yield "unconditional", lay_out(paint([""] * COLUMNS), [""] * COLUMNS, COLUMNS)
    for width, height in WIDE:
        yield f"{width}x{height}", lay_out(*of_size(bundle, names, width, height), 3)


def of_prompts(paint: Painter, names: Sequence[str]) -> Captioned:
    """Held-out (name, colour) pairs."""
    prompts = [caption_of(*pair) for pair in held_out_prompts(names, 4 * COLUMNS, seed=1)]
    return paint(prompts), prompts


def of_layouts(paint: Painter, names: Sequence[str]) -> Captioned:
    """Two boxes without a prompt, beside or above each other, and below them what came of them."""
    rng, f = np.random.default_rng(4), paint.bundle.spec.autoencoder.factor
    maps, shown, words = [], [], []
    for index in range(COLUMNS):
        numbers = rng.permutation(len(names))[:2] + 1
        regions = np.zeros((SIZE // f, SIZE // f), np.int64)
        beside = index % 2 == 0
        for half, number in enumerate(numbers):
            area = (
                regions[4:12, 8 * half : 8 * half + 7] if beside else regions[8 * half : 8 * half + 7, 4:12]
            )
            area[:] = number
        maps.append(regions)
        shown.append(coloured(regions, numbers, f))
        words.append(", ".join(names[number - 1] for number in numbers))
    made = paint([""] * COLUMNS, paint.regions(maps))
    return np.concatenate([np.stack(shown), made]), [*words, *[""] * COLUMNS]


def coloured(regions: np.ndarray, numbers: Sequence[int], factor: int) -> np.ndarray:
    """Regions as a picture, uint8 (H, W, 3)."""
    picture = np.full((*regions.shape, 3), 225, np.uint8)
    for number, colour in zip(numbers, ("orange", "blue"), strict=True):
        picture[regions == number] = COLOURS[colour]
    return picture.repeat(factor, 0).repeat(factor, 1)


def of_holes(paint: Painter, names: Sequence[str]) -> Captioned:
    """Pictures with a hole, what a prompt puts there, and what comes without one."""
    scenes = held_out_scenes(Atlas(names), COLUMNS, seed=5)
    pictures = np.stack([scene.picture for scene in scenes])
    holes = object_holes(scenes)
    around = paint.around(pictures, holes)
    gray = np.where(holes[..., None], 128, pictures).astype(np.uint8)
    captions = [scene.caption for scene in scenes]
    rows = [gray]
    for prompts in (captions, [""] * COLUMNS):
        rows.append(np.where(holes[..., None], paint(prompts, around), pictures))
    return np.concatenate(rows), [*[""] * COLUMNS, *captions, *["no prompt"] * COLUMNS]


@torch.inference_mode()
def of_size(bundle: LatentDiffusion, names: Sequence[str], width: int, height: int) -> Captioned:
    """Three held-out prompts at a size that training never had."""
    defaults = bundle.spec.defaults
    prompts = [caption_of(*pair) for pair in held_out_prompts(names, 3, seed=6)]
    x = bundle.sample(prompts, range(3), defaults.steps, defaults.guidance_scale, size=(width, height))
    return to_pictures(x), prompts


def lay_out(pictures: Pictures, captions: Sequence[str], columns: int) -> Image.Image:
    """pictures uint8 (B, H, W, 3), row by row, each with its caption below."""
    _, height, width, _ = pictures.shape
    rows = -(-len(pictures) // columns)
    out = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + CAPTION + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(11)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = GAP + index % columns * (width + GAP)
        y = GAP + index // columns * (height + CAPTION + GAP)
        out.paste(Image.fromarray(picture), (x, y))
        lines = "\n".join(wrap(caption, LINE))
        draw.multiline_text((x, y + height + 2), lines, "black", font, spacing=1)
    return out

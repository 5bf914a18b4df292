"""Sheets of captioned pictures, one for each task, the same for everyone who makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.latent_diffusion import LatentDiffusion
from models.training.evaluate import (
    Painter,
    Pictures,
    held_out_prompts,
    object_holes,
    random_holes,
    related_prompts,
    to_pictures,
)
from models.training.scenes import GRAY, SIZE, Atlas, caption_of, held_out_scenes

CAPTION = 46  # pixels below each picture, for three lines
LINE = 22  # characters
GAP = 8
COLUMNS = 6
GRAYS = np.array([225, 130, 60], np.uint8)  # of where no box is, and of boxes
WIDE = ((192, 128), (256, 128))  # larger than anything in training

Captioned = tuple[Pictures, Sequence[str]]


def sheets(bundle: LatentDiffusion, names: Sequence[str], steps: int) -> Iterator[tuple[str, Image.Image]]:
    """(task, sheet) for all that the model in the box does; nothing is chosen by hand."""
    paint = Painter(bundle, steps, bundle.spec.defaults.guidance_scale, total=12 * COLUMNS)
    yield "text-to-image", lay_out(*of_prompts(paint, names), COLUMNS)
    yield "two-objects", lay_out(*of_relations(paint, names), COLUMNS)
    yield "layout-to-image", lay_out(*of_layouts(paint, names), COLUMNS)
    yield "inpainting", lay_out(*of_holes(paint, names), COLUMNS)
    yield "unconditional", lay_out(paint([""] * COLUMNS), [""] * COLUMNS, COLUMNS)
    for width, height in WIDE:
        yield f"{width}x{height}", lay_out(*of_size(paint, names, width, height), 3)


def of_prompts(paint: Painter, names: Sequence[str]) -> Captioned:
    """Held-out (name, colour) pairs."""
    prompts = [caption_of(*pair) for pair in held_out_prompts(names, 4 * COLUMNS, seed=1)]
    return paint(prompts), prompts


def of_relations(paint: Painter, names: Sequence[str]) -> Captioned:
    """Two objects, one beside or over the other."""
    prompts = [each.prompt for each in related_prompts(names, 2 * COLUMNS, seed=7)]
    return paint(prompts), prompts


def of_layouts(paint: Painter, names: Sequence[str]) -> Captioned:
    """Boxes, one and then two, and what fills them: their labels are the prompt."""
    rng, f = np.random.default_rng(4), paint.bundle.spec.autoencoder.factor
    rows, captions = [], []
    for boxes in (1, 2):
        numbers = [rng.permutation(len(names))[:boxes] + 1 for _ in range(COLUMNS)]
        maps = [boxes_of(rng, some, SIZE // f) for some in numbers]
        words = [" and ".join(names[number - 1] for number in some) for some in numbers]
        gray = np.stack([GRAYS[np.unique(regions, return_inverse=True)[1]] for regions in maps])
        rows += [gray.repeat(f, 1).repeat(f, 2)[..., None].repeat(3, -1), paint(words, paint.regions(maps))]
        captions += [*[""] * COLUMNS, *words]
    return np.concatenate(rows), captions


def boxes_of(rng: np.random.Generator, numbers: Sequence[int], cells: int) -> np.ndarray:
    """A box for each number, side by side, as (cells, cells) of the numbers or 0."""
    regions, width = np.zeros((cells, cells), np.int64), cells // len(numbers)
    for index, number in enumerate(numbers):
        side = int(rng.integers(width // 2 + 2, width - 1)) if len(numbers) == 1 else width - 1
        left, top = (int(rng.integers(0, room - side + 1)) for room in (width, cells))
        regions[top : top + side, index * width + left : index * width + left + side] = number
    return regions


def of_holes(paint: Painter, names: Sequence[str]) -> Captioned:
    """Pictures with a hole and what comes there: over an object with a prompt, anywhere without one."""
    scenes = held_out_scenes(Atlas(names), COLUMNS, seed=5)
    pictures, captions = np.stack([scene.picture for scene in scenes]), [scene.caption for scene in scenes]
    rows, below = [], []
    for holes, prompts in ((object_holes(scenes), captions), (random_holes(scenes), [""] * COLUMNS)):
        made = paint(prompts, paint.around(pictures, holes))
        rows += [np.where(holes[..., None], fill, pictures) for fill in (np.uint8(GRAY), made)]
        below += [*[""] * COLUMNS, *(prompt or "no prompt" for prompt in prompts)]
    return np.concatenate(rows), below


@torch.inference_mode()
def of_size(paint: Painter, names: Sequence[str], width: int, height: int) -> Captioned:
    """Three held-out prompts at a size that training never had."""
    prompts = [caption_of(*pair) for pair in held_out_prompts(names, 3, seed=6)]
    x = paint.bundle.sample(prompts, range(3), paint.steps, paint.guidance_scale, size=(width, height))
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

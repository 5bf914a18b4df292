"""Sheets of captioned images, one per task, with fixed seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.latent_diffusion import LatentDiffusion
from models.training.evaluate import (
    Images,
    Painter,
    held_out_prompts,
    object_masks,
    random_masks,
    related_prompts,
    to_images,
)
from models.training.scenes import GRAY, SIZE, Atlas, Integers, caption_of, held_out_scenes

CAPTION_HEIGHT = 46  # pixels below each image, for three lines
LINE_CHARS = 22
GAP = 8  # pixels between images
COLUMNS = 6
LAYOUT_GRAYS = np.array([225, 130, 60], np.uint8)  # background, then the first and the second box
WIDE_SIZES = ((192, 128), (256, 128))  # larger than any training image

Captioned = tuple[Images, Sequence[str]]


def sheets(
    model: LatentDiffusion, names: Sequence[str], steps: int, guidance_scale: float, sampler: str = "ddim"
) -> Iterator[tuple[str, Image.Image]]:
    """(task, sheet) for every task of the bundled model; no image is chosen by hand."""
    paint = Painter(model, steps, guidance_scale, total=12 * COLUMNS, sampler=sampler)
    yield "text-to-image", lay_out(*of_prompts(paint, names), COLUMNS)
    yield "two-objects", lay_out(*of_relations(paint, names), COLUMNS)
    yield "layout-to-image", lay_out(*of_layouts(paint, names), COLUMNS)
    yield "inpainting", lay_out(*of_masks(paint, names), COLUMNS)
    yield "unconditional", lay_out(paint([""] * COLUMNS), [""] * COLUMNS, COLUMNS)
    for width, height in WIDE_SIZES:
        yield f"{width}x{height}", lay_out(*of_size(paint, names, width, height), 3)


def of_prompts(paint: Painter, names: Sequence[str]) -> Captioned:
    """Prompts of held-out (name, colour) pairs."""
    prompts = [caption_of(*pair) for pair in held_out_prompts(names, 4 * COLUMNS, seed=1)]
    return paint(prompts), prompts


def of_relations(paint: Painter, names: Sequence[str]) -> Captioned:
    """Prompts of two objects in a relation."""
    prompts = [each.prompt for each in related_prompts(names, 2 * COLUMNS, seed=7)]
    return paint(prompts), prompts


def of_layouts(paint: Painter, names: Sequence[str]) -> Captioned:
    """Layouts of one box, then of two, and their images. The prompt names the labels."""
    rng, f = np.random.default_rng(4), paint.model.spec.autoencoder.factor
    rows, captions = [], []
    for boxes in (1, 2):
        numbers = [(rng.permutation(len(names))[:boxes] + 1).tolist() for _ in range(COLUMNS)]
        maps = [boxes_of(rng, some, SIZE // f) for some in numbers]
        words = [" and ".join(names[number - 1] for number in some) for some in numbers]
        gray = np.stack([LAYOUT_GRAYS[np.unique(regions, return_inverse=True)[1]] for regions in maps])
        rows += [
            gray.repeat(f, 1).repeat(f, 2)[..., None].repeat(3, -1),
            paint(words, paint.for_layouts(maps)),
        ]
        captions += [*[""] * COLUMNS, *words]
    return np.concatenate(rows), captions


def boxes_of(rng: np.random.Generator, numbers: Sequence[int], cells: int) -> Integers:
    """A map (cells, cells) with one box per label number, side by side; 0: no label."""
    regions, width = np.zeros((cells, cells), np.int64), cells // len(numbers)
    for index, number in enumerate(numbers):
        side = int(rng.integers(width // 2 + 2, width - 1)) if len(numbers) == 1 else width - 1
        left, top = (int(rng.integers(0, room - side + 1)) for room in (width, cells))
        regions[top : top + side, index * width + left : index * width + left + side] = number
    return regions


def of_masks(paint: Painter, names: Sequence[str]) -> Captioned:
    """Masked images and their inpainting: masks over the object, with a prompt; random masks, without one."""
    scenes = held_out_scenes(Atlas(names), COLUMNS, seed=5)
    images, captions = np.stack([scene.image for scene in scenes]), [scene.caption for scene in scenes]
    rows: list[Images] = []
    below: list[str] = []
    for masks, prompts in ((object_masks(scenes), captions), (random_masks(scenes), [""] * COLUMNS)):
        made = paint(prompts, paint.for_inpainting(images, masks))
        rows += [np.where(masks[..., None], fill, images) for fill in (np.uint8(GRAY), made)]
        below += [*[""] * COLUMNS, *(prompt or "no prompt" for prompt in prompts)]
    return np.concatenate(rows), below


@torch.inference_mode()
def of_size(paint: Painter, names: Sequence[str], width: int, height: int) -> Captioned:
    """Three held-out prompts at a size that was not trained on."""
    prompts = [caption_of(*pair) for pair in held_out_prompts(names, 3, seed=6)]
    x = paint.model.sample(
        prompts, range(3), paint.steps, paint.guidance_scale, size=(width, height), sampler=paint.sampler
    )
    return to_images(x), prompts


def lay_out(images: Images, captions: Sequence[str], columns: int) -> Image.Image:
    """A sheet of images (B, H, W, 3), row by row, each with its caption below."""
    _, height, width, _ = images.shape
    rows = -(-len(images) // columns)
    out = Image.new(
        "RGB", (columns * (width + GAP) + GAP, rows * (height + CAPTION_HEIGHT + GAP) + GAP), "white"
    )
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(11)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = GAP + index % columns * (width + GAP)
        y = GAP + index // columns * (height + CAPTION_HEIGHT + GAP)
        out.paste(Image.fromarray(image), (x, y))
        lines = "\n".join(wrap(caption, LINE_CHARS))
        draw.multiline_text((x, y + height + 2), lines, "black", font, spacing=1)
    return out

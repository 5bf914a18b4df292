"""A sheet of captioned pictures, the same for everyone who makes it."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from models.latent_diffusion import LatentDiffusion
from models.training.evaluate import held_out_prompts, to_pictures
from models.training.scenes import caption_of

CAPTION = 46  # pixels below each picture, for three lines
LINE = 22  # characters
GAP = 8


@torch.inference_mode()
def sheet(
    bundle: LatentDiffusion, names: Sequence[str], columns: int = 6, rows: int = 4, seed: int = 1
) -> Image.Image:
    """Pictures of held-out (name, colour) pairs, none chosen by hand; picture i has seed i."""
    prompts = [caption_of(*pair) for pair in held_out_prompts(names, columns * rows, seed)]
    defaults = bundle.spec.defaults
    x = bundle.sample(prompts, range(len(prompts)), defaults.steps, defaults.guidance_scale)
    return lay_out(to_pictures(x), prompts, columns)


def lay_out(pictures: np.ndarray, captions: Sequence[str], columns: int) -> Image.Image:
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

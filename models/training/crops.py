"""Training data of the upscaler: sharp crops, and the same as bad pictures a quarter of their size.

Sharp ones are drawn scenes in several sizes and, to stand for photographs, dead leaves: shapes of all sizes
that hide each other have the statistics of natural pictures (Lee, Mumford and Huang 2001), and are enough to
learn to restore them (Achddou et al. 2021).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from models.training.scenes import SIZE, Atlas, draw_scene

SCALE = 4
LEAVES = 0.5  # share of dead leaves
CLEAN = 0.5  # share of small pictures that are only resampled
RESAMPLINGS = (
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
)
KINDS = {"one": 0.3, "tilted": 0.2, "counted": 0.15, "three": 0.15, "fancy": 0.2}


def draw_crop(atlas: Atlas, rng: np.random.Generator) -> np.ndarray:
    """A sharp picture, uint8 (128, 128, 3)."""
    picture = dead_leaves(rng) if rng.random() < LEAVES else draw_glyphs(atlas, rng)
    picture = np.rot90(picture, rng.integers(4)) if rng.random() < 0.5 else picture
    return np.ascontiguousarray(picture)


def draw_glyphs(atlas: Atlas, rng: np.random.Generator) -> np.ndarray:
    """A scene, or a part of four that were made smaller."""
    if rng.random() < 0.6:
        return draw_scene(atlas, rng, sizes=(56, 121), kinds=KINDS).picture
    scenes = [draw_scene(atlas, rng, sizes=(56, 121), kinds=KINDS).picture for _ in range(4)]
    sheet = Image.fromarray(np.vstack([np.hstack(scenes[:2]), np.hstack(scenes[2:])]))
    side = int(rng.integers(SIZE, 2 * SIZE))
    sheet = sheet.resize((side, side), Image.Resampling.LANCZOS)
    left, top = rng.integers(0, side - SIZE + 1, 2)
    return np.asarray(sheet)[top : top + SIZE, left : left + SIZE]


def dead_leaves(rng: np.random.Generator) -> np.ndarray:
    """Shapes that hide each other, sizes by a power law, each plain, graded or textured."""
    big = 2 * SIZE  # drawn at twice the size, for smooth edges
    canvas = Image.fromarray(texture(rng, big))
    vivid = rng.choice((25, 120), p=(0.7, 0.3))  # most of what is photographed is not
    palette = rng.integers(0, 256, (int(rng.integers(3, 12)), 1)) + rng.normal(0, vivid, 3)
    palette = palette + rng.normal(0, vivid, palette.shape)
    low = rng.uniform(4, 24)
    for _ in range(int(rng.integers(10, 120))):
        size = int(min(low * (1 - rng.random()) ** -0.7, 0.8 * big))
        x, y = (int(v) for v in rng.integers(-size // 2, big, 2))
        colour = np.clip(palette[rng.integers(len(palette))] + rng.normal(0, 12, 3), 0, 255)
        mask = shape(rng, size)
        if size > 24 and rng.random() < 0.5:
            canvas.paste(Image.fromarray(texture(rng, size, colour)), (x, y), mask)
        else:
            canvas.paste(tuple(int(c) for c in colour), (x, y, x + size, y + size), mask)
    small = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    if rng.random() < 0.5:  # photographs are seldom sharp to the pixel
        small = small.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
    return np.asarray(small)


def shape(rng: np.random.Generator, size: int) -> Image.Image:
    """The outline of a leaf: an ellipse, a polygon, or a line."""
    mask, draw = (m := Image.new("L", (size, size))), ImageDraw.Draw(m)
    kind = rng.integers(3)
    if kind == 0:
        inset = rng.integers(0, max(size // 3, 1), 2)
        draw.ellipse((*inset, size - 1 - inset[0], size - 1 - inset[1]), fill=255)
        return mask.rotate(float(rng.uniform(0, 180)))
    if kind == 1:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
        points = size / 2 * (1 + np.stack([np.cos(angles), np.sin(angles)], axis=1))
        draw.polygon([tuple(point) for point in points], fill=255)
        return mask
    points = [tuple(map(int, point)) for point in rng.integers(0, size, (int(rng.integers(2, 5)), 2))]
    draw.line(points, fill=255, width=max(2, int(size * rng.uniform(0.03, 0.15))), joint="curve")
    return mask


def texture(rng: np.random.Generator, size: int, colour: np.ndarray | None = None) -> np.ndarray:
    """A grade between two colours with noise of all wavelengths on it, uint8 (size, size, 3)."""
    first = np.clip(rng.uniform(0, 255) + rng.normal(0, 40, 3), 0, 255) if colour is None else colour
    other = np.clip(first + rng.normal(0, 40, 3), 0, 255)
    direction, line = rng.uniform(0, 2 * np.pi), np.linspace(-0.5, 0.5, size)
    grade = 0.5 + np.cos(direction) * line[:, None] + np.sin(direction) * line
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / frequency ** rng.uniform(0.6, 1.6)
    noise = np.fft.irfft2(spectrum, (size, size))
    noise *= rng.uniform(0, 25) / max(noise.std(), 1e-9)
    mixed = first + (other - first) * grade[..., None] + noise[..., None]
    return np.clip(mixed, 0, 255).astype(np.uint8)


def degrade(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A quarter of the size, resampled in one of the ways there are; half also blurred, noisy or JPEGs.

    picture: uint8 (H, W, 3) -> uint8 (H/4, W/4, 3).
    """
    image = Image.fromarray(picture)
    size = image.width // SCALE, image.height // SCALE
    if rng.random() < CLEAN:
        return np.asarray(image.resize(size, RESAMPLINGS[rng.integers(2)]))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2.5)))
    small = np.asarray(image.resize(size, RESAMPLINGS[rng.integers(len(RESAMPLINGS))]))
    noise = rng.normal(0, rng.uniform(0, 10), small.shape[: rng.integers(2, 4)])
    small = small + noise.reshape(*noise.shape, *[1] * (3 - noise.ndim))
    image = Image.fromarray(small.clip(0, 255).astype(np.uint8))
    return as_jpeg(image, int(rng.integers(40, 96))) if rng.random() < 0.6 else np.asarray(image)


def as_jpeg(image: Image.Image, quality: int) -> np.ndarray:
    """What is left of a picture after such a file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def smaller(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) at a quarter of their size by bicubic resampling: (B, H/4, W/4, 3)."""
    images = map(Image.fromarray, pictures)
    return np.stack(
        [i.resize((i.width // SCALE, i.height // SCALE), Image.Resampling.BICUBIC) for i in images]
    )


def larger(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (h, w, 3) at four times their size by bicubic resampling: (B, 4h, 4w, 3)."""
    images = map(Image.fromarray, pictures)
    return np.stack([i.resize((i.width * SCALE, i.height * SCALE), Image.Resampling.BICUBIC) for i in images])

"""Training data of the upscaler: sharp images, and degraded copies at a quarter of their size.

The sharp images are drawn scenes in several sizes and, instead of photographs, dead leaves: shapes of all
sizes that occlude each other have the statistics of natural images (Lee, Mumford and Huang 2001) and suffice
for learning restoration (Achddou et al. 2021).
"""

from __future__ import annotations

import io
import string
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.nn.functional import interpolate

from models.training.scenes import SIZE, Atlas, Floats, Pixels, draw_scene

SCALE = 4  # how many times larger sharp images are than their degraded copies
KINDS = {"scene": 0.5, "leaves": 0.35, "text": 0.1, "texture": 0.05}  # of sharp images, and their shares
ALIASED_SHARE = 0.1  # of degraded copies that are resampled without antialiasing
CLEAN_SHARE = 0.6  # of the other degraded copies that are only resampled
RESAMPLINGS = (
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
)
SCENE_KINDS = {"one": 0.3, "related": 0.15, "tilted": 0.15, "counted": 0.1, "three": 0.1, "fancy": 0.2}
LETTERS = string.ascii_letters + string.digits + " .,:;!?-"


def draw_crop(atlas: Atlas, rng: np.random.Generator) -> Pixels:
    """A sharp image, (128, 128, 3)."""
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    if kind == "scene":
        image = draw_glyphs(atlas, rng)
    elif kind == "leaves":
        image = dead_leaves(rng)
    else:
        image = draw_text(rng) if kind == "text" else texture(rng, SIZE)
    image = np.rot90(image, int(rng.integers(4))) if rng.random() < 0.5 else image
    return np.ascontiguousarray(image)


def draw_glyphs(atlas: Atlas, rng: np.random.Generator) -> Pixels:
    """A scene, or a crop of four scenes side by side that were scaled down."""
    if rng.random() < 0.6:
        return draw_scene(atlas, rng, sizes=(56, 121), kinds=SCENE_KINDS).image
    scenes = [draw_scene(atlas, rng, sizes=(56, 121), kinds=SCENE_KINDS).image for _ in range(4)]
    sheet = Image.fromarray(np.vstack([np.hstack(scenes[:2]), np.hstack(scenes[2:])]))
    side = int(rng.integers(SIZE, 2 * SIZE))
    sheet = sheet.resize((side, side), Image.Resampling.LANCZOS)
    left, top = rng.integers(0, side - SIZE + 1, 2)
    return np.asarray(sheet)[top : top + SIZE, left : left + SIZE]


def dead_leaves(rng: np.random.Generator) -> Pixels:
    """An image of shapes that occlude each other, of sizes by a power law: (128, 128, 3)."""
    big = 2 * SIZE  # drawn at twice the size and scaled down, for smooth edges
    canvas = Image.fromarray(texture(rng, big))
    spread = rng.choice((25, 120), p=(0.7, 0.3))  # most photographs have muted colours
    palette = rng.integers(0, 256, (int(rng.integers(3, 12)), 1)) + rng.normal(0, spread, 3)
    palette = palette + rng.normal(0, spread, palette.shape)
    smallest = rng.uniform(4, 24)
    for _ in range(int(rng.integers(10, 120))):
        size = int(min(smallest * (1 - rng.random()) ** -0.7, 0.8 * big))
        x, y = (int(v) for v in rng.integers(-size // 2, big, 2))
        colour = np.clip(palette[rng.integers(len(palette))] + rng.normal(0, 12, 3), 0, 255)
        mask = leaf(rng, size)
        if size > 24 and rng.random() < 0.5:
            canvas.paste(Image.fromarray(texture(rng, size, colour)), (x, y), mask)
        else:
            red, green, blue = (int(c) for c in colour)
            canvas.paste((red, green, blue), (x, y, x + size, y + size), mask)
    small = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    if rng.random() < 0.5:  # photographs are rarely sharp to the pixel
        small = small.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
    return np.asarray(small)


def draw_text(rng: np.random.Generator) -> Pixels:
    """Lines of random letters of one size on a texture: (128, 128, 3)."""
    image, size = Image.fromarray(texture(rng, SIZE)), int(rng.integers(10, 41))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
    for y in range(int(rng.integers(-size, 4)), SIZE, int(size * rng.uniform(1, 1.6))):
        line = "".join(rng.choice(list(LETTERS), 200 // size + 8))
        draw.text((int(rng.integers(-size, 8)), y), line, (red, green, blue), font)
    return np.asarray(image)


def leaf(rng: np.random.Generator, size: int) -> Image.Image:
    """The mask of one shape, (size, size): an ellipse, a polygon or a line."""
    mask = Image.new("L", (size, size))
    draw, kind = ImageDraw.Draw(mask), rng.integers(3)
    if kind == 0:
        inset = rng.integers(0, max(size // 3, 1), 2)
        draw.ellipse((*inset, size - 1 - inset[0], size - 1 - inset[1]), fill=255)
        return mask.rotate(float(rng.uniform(0, 180)))
    if kind == 1:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
        corners = size / 2 * (1 + np.stack([np.cos(angles), np.sin(angles)], axis=1))
        draw.polygon([tuple(corner) for corner in corners], fill=255)
        return mask
    points = [tuple(map(int, point)) for point in rng.integers(0, size, (int(rng.integers(2, 5)), 2))]
    draw.line(points, fill=255, width=max(2, int(size * rng.uniform(0.03, 0.15))), joint="curve")
    return mask


def texture(rng: np.random.Generator, size: int, colour: Floats | None = None) -> Pixels:
    """A gradient from a colour, random if None, to a similar one, with noise of all wavelengths.

    -> (size, size, 3).
    """
    first = np.clip(rng.uniform(0, 255) + rng.normal(0, 40, 3), 0, 255) if colour is None else colour
    other = np.clip(first + rng.normal(0, 40, 3), 0, 255)
    direction, line = rng.uniform(0, 2 * np.pi), np.linspace(-0.5, 0.5, size)
    gradient = 0.5 + np.cos(direction) * line[:, None] + np.sin(direction) * line
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / frequency ** rng.uniform(0.6, 1.6)
    noise = np.fft.irfft2(spectrum, (size, size))
    noise *= rng.uniform(0, 25) / max(noise.std(), 1e-9)
    mixed = first + (other - first) * gradient[..., None] + noise[..., None]
    pixels: Pixels = np.clip(mixed, 0, 255).astype(np.uint8)
    return pixels


def degrade(sharp: Pixels, rng: np.random.Generator) -> Pixels:
    """A degraded copy at a quarter of the size: (H, W, 3) -> (H/4, W/4, 3).

    Most copies are only resampled; the others are also blurred and noisy, and most of those JPEGs.
    """
    image = Image.fromarray(sharp)
    size = image.width // SCALE, image.height // SCALE
    if rng.random() < ALIASED_SHARE:
        return aliased(sharp)
    if rng.random() < CLEAN_SHARE:
        return np.asarray(image.resize(size, RESAMPLINGS[rng.integers(2)]))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2.5)))
    small = np.asarray(image.resize(size, RESAMPLINGS[rng.integers(len(RESAMPLINGS))]))
    noise = rng.normal(
        0, rng.uniform(0, 10), small.shape[: rng.integers(2, 4)]
    )  # one value per pixel, or one per channel
    noisy = small + noise.reshape(*noise.shape, *[1] * (3 - noise.ndim))
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    return as_jpeg(image, int(rng.integers(40, 96))) if rng.random() < 0.6 else np.asarray(image)


def aliased(sharp: Pixels) -> Pixels:
    """A copy at a quarter of the size by PyTorch's bicubic interpolation without antialiasing."""
    x = torch.from_numpy(sharp.copy()).movedim(-1, 0)[None].float()
    small = interpolate(x, scale_factor=1 / SCALE, mode="bicubic")[0].movedim(0, -1)
    return small.round().clamp(0, 255).byte().numpy()


def as_jpeg(image: Image.Image, quality: int) -> Pixels:
    """The image after JPEG compression."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    with Image.open(file) as decoded:
        return np.asarray(decoded)


def smaller(images: Iterable[Pixels]) -> Pixels:
    """Images (H, W, 3) at a quarter of their size by bicubic resampling: (B, H/4, W/4, 3)."""
    return np.stack([resampled(image, 1 / SCALE) for image in images])


def larger(images: Iterable[Pixels]) -> Pixels:
    """Images (h, w, 3) at four times their size by bicubic resampling: (B, 4h, 4w, 3)."""
    return np.stack([resampled(image, SCALE) for image in images])


def resampled(pixels: Pixels, scale: float) -> Pixels:
    """One image, resampled bicubically."""
    image = Image.fromarray(pixels)
    size = int(image.width * scale), int(image.height * scale)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))

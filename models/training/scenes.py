"""Drawn training data: scenes of named emoji, with captions and segmentation maps.

Glyphs come from the Noto Color Emoji font (OFL 1.1), names from Unicode. Both change between releases, so
`glyphs.txt` fixes which code points are used and under which names.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SHA256 = (
    "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"  # Debian 12's fonts-noto-color-emoji
)
FONT_SIZE = 109  # the only size the font's bitmaps come in
SIZE = 128  # side of a scene
GRAY = 128  # masked pixels: Masking.masked_pixel as uint8
COLOURS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "gray": (140, 140, 140),
    "red": (220, 50, 50),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 80),
    "green": (70, 170, 80),
    "blue": (60, 110, 220),
    "light blue": (150, 205, 245),
    "purple": (140, 80, 190),
    "pink": (245, 160, 200),
    "brown": (130, 90, 60),
}


class Placed(NamedTuple):
    """An object of a scene."""

    name: str
    size: int  # longer side, in pixels
    x: int  # centre, in pixels
    y: int
    rotation: float = 0.0  # in degrees


@dataclass(frozen=True)
class Scene:
    """One image with its captions and the positions of its objects."""

    image: Pixels  # (128, 128, 3)
    caption: str
    short_caption: str  # the caption without the background
    base: Pixels  # (128, 128, 3), the background alone
    placed: tuple[Placed, ...]
    regions: Pixels  # (128, 128): number of the visible object at each pixel, from 1; 0: background

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its objects."""
        return tuple(each.name for each in self.placed)

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Bounds of the visible part of each object, in pixels."""
        return [bounds(self.regions == index) for index in range(1, len(self.names) + 1)]


def bounds(mask: Mask) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (both exclusive) of the true pixels of (H, W); all 0 if there are none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class GlyphError(RuntimeError):
    """The emoji font is missing, or lacks a glyph."""


def caption_of(name: str, colour: str) -> str:
    """The caption of a scene of one object."""
    return f"{name} on a {colour} background"


def held_out(name: str, colour: str) -> bool:
    """Whether a (name, colour) pair is excluded from training, for evaluation; about one in ten is."""
    return hashlib.sha256(f"{name}|{colour}".encode()).digest()[0] < 26


def known_glyphs() -> dict[str, int]:
    """Name -> code point of every glyph of the data set, from glyphs.txt."""
    text = resources.files("models.training").joinpath("glyphs.txt").read_text()
    rows = (line.split(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: int(code, 16) for code, name in rows}


def draw_glyph(font: ImageFont.FreeTypeFont, code: int) -> Image.Image | None:
    """One glyph as RGBA, cropped to its visible pixels; None if the font does not have it."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), chr(code), font=font, embedded_color=True)
    box = canvas.getbbox()
    return canvas.crop(box) if box else None


def load_font(path: Path = FONT) -> ImageFont.FreeTypeFont:
    """The emoji font. Raises GlyphError if it is not installed."""
    if not path.exists():
        raise GlyphError(f"{path} is missing: install Debian's fonts-noto-color-emoji")
    return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def find_glyphs(font: ImageFont.FreeTypeFont) -> dict[str, int]:
    """Name -> code point of the font's distinct glyphs of one code point. Made glyphs.txt."""
    found: dict[str, int] = {}
    seen: set[bytes] = set()
    for code in [*range(0xA9, 0x3300), *range(0x1F000, 0x1FB00)]:
        name = unicodedata.name(chr(code), "").lower()
        glyph = draw_glyph(font, code) if name else None
        if glyph is None or min(glyph.size) < 16 or 0x1F3FB <= code <= 0x1F3FF:
            continue
        digest = hashlib.sha256(glyph.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            found[name] = code
    return found


class Atlas:
    """Every glyph of the data set, drawn once."""

    def __init__(self, names: Sequence[str] | None = None) -> None:
        """Raises GlyphError for a missing font, KeyError for an unknown name."""
        font, codes = load_font(), known_glyphs()
        self.names = list(codes) if names is None else list(names)
        self._glyphs = {name: draw_glyph(font, codes[name]) for name in self.names}

    def glyph(self, name: str, size: int) -> Image.Image:
        """RGBA, its longer side `size` pixels."""
        glyph = self._glyphs[name]
        if glyph is None:
            raise GlyphError(f"the font has no glyph for {name!r}; it may be another release")
        scale = size / max(glyph.size)
        width, height = (max(1, round(s * scale)) for s in glyph.size)
        return glyph.resize((width, height), Image.Resampling.LANCZOS)


def compose(atlas: Atlas, base: Pixels, placed: Sequence[Placed]) -> tuple[Pixels, Pixels]:
    """Draws objects in turn on a background (128, 128, 3) -> image and regions, as in Scene."""
    canvas, regions = Image.fromarray(base), np.zeros((SIZE, SIZE), np.uint8)
    for index, (name, size, x, y, rotation) in enumerate(placed, 1):
        glyph = atlas.glyph(name, size)
        if rotation:
            glyph = glyph.rotate(rotation, Image.Resampling.BICUBIC, expand=True)
        corner = x - glyph.width // 2, y - glyph.height // 2
        canvas.paste(glyph, corner, glyph)
        cover = Image.new("L", canvas.size)
        cover.paste(glyph.getchannel("A"), corner)
        regions[np.asarray(cover) >= 128] = index
    return np.asarray(canvas), regions


def flat(colour: str) -> Pixels:
    """A background of one colour, (128, 128, 3)."""
    return np.full((SIZE, SIZE, 3), COLOURS[colour], np.uint8)


def gradient(above: str, below: str) -> Pixels:
    """A background from one colour at the top to another at the bottom."""
    part = np.linspace(0, 1, SIZE)[:, None, None]
    mixed = (1 - part) * np.array(COLOURS[above]) + part * np.array(COLOURS[below])
    return np.broadcast_to(mixed, (SIZE, SIZE, 3)).round().astype(np.uint8)


def striped(rng: np.random.Generator, colour: str) -> Pixels:
    """A background of stripes in a colour and a paler one, 16 pixels wide."""
    pale = 0.5 * np.array(COLOURS[colour]) + 0.5 * np.array((255, 255, 255))
    stripe = (np.arange(SIZE) + rng.integers(32)) // 16 % 2 == 0
    return np.where(stripe[None, :, None], flat(colour), pale.astype(np.uint8)).repeat(SIZE, 0)[:SIZE]


def dotted(colour: str) -> Pixels:
    """A background of pale dots in rows."""
    pale = 0.4 * np.array(COLOURS[colour]) + 0.6 * np.array((255, 255, 255))
    row, column = np.mgrid[:SIZE, :SIZE]
    inside = (row % 32 - 16) ** 2 + (column % 32 - 16) ** 2 < 60
    return np.where(inside[:, :, None], pale.astype(np.uint8), flat(colour))


def between(rng: np.random.Generator, low: int, high: int) -> int:
    """A random integer from low to high - 1."""
    return int(rng.integers(low, high))


def anywhere(rng: np.random.Generator, name: str, size: int, rotation: float = 0.0) -> Placed:
    """An object at a random position wholly inside the image."""
    low, high = size // 2 + 2, max(SIZE - size // 2 - 1, size // 2 + 3)
    return Placed(name, size, between(rng, low, high), between(rng, low, high), rotation)


RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}  # (axis, direction)
NUMBERS = {2: "two", 3: "three", 4: "four"}
CENTRES = {  # number of objects -> their centres, in rows
    2: [(33, 64), (95, 64)],
    3: [(64, 33), (33, 95), (95, 95)],
    4: [(33, 33), (95, 33), (33, 95), (95, 95)],
}


def related(rng: np.random.Generator, names: Sequence[str], relation: str) -> list[Placed]:
    """Two objects, the first in the given relation to the second."""
    axis, direction = RELATIONS[relation]
    size, other = between(rng, 54, 61), between(rng, 42, 87)
    sides = [31 + between(rng, 0, 2), 96 + between(rng, 0, 2)][::direction]
    centres = [(side, other) if axis == 0 else (other, side) for side in sides]
    return [Placed(name, size, *centre) for name, centre in zip(names, centres, strict=True)]


def spread(rng: np.random.Generator, names: Sequence[str]) -> list[Placed]:
    """Two to four objects in rows, each moved by up to three pixels."""
    size = between(rng, 50, 61)
    jitter = rng.integers(-3, 4, (len(names), 2))
    centres = np.array(CENTRES[len(names)]) + jitter
    return [Placed(name, size, int(x), int(y)) for name, (x, y) in zip(names, centres, strict=True)]


KINDS = {  # kind of scene -> how often it is drawn
    "one": 0.28,
    "small": 0.02,
    "large": 0.02,
    "upside down": 0.01,
    "tilted": 0.01,
    "counted": 0.02,
    "related": 0.6,
    "three": 0.02,
    "fancy": 0.02,
}
UNRELATED_SHARE = 0.15  # of captions of two objects: "and" instead of the relation


def draw_scene(
    atlas: Atlas,
    rng: np.random.Generator,
    sizes: tuple[int, int] = (72, 121),
    kinds: Mapping[str, float] = KINDS,
) -> Scene:
    """A random training scene, never of a held-out pair.

    kinds: as in KINDS; sizes: range of the size of a single object, in pixels.
    """
    while True:
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        names = [atlas.names[i] for i in rng.integers(len(atlas.names), size=3)]
        kind = str(rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values())))
        placed, words = place_objects(rng, names, kind, sizes)
        if any(held_out(each.name, colour) for each in placed):
            continue
        base, background = flat(colour), f"{colour} background"
        if kind == "fancy":
            base, background = fancy(rng, colour)
        caption = f"{words} on a {background}"
        image, regions = compose(atlas, base, placed)
        return Scene(image, caption, words, base, tuple(placed), regions)


def place_objects(
    rng: np.random.Generator, names: Sequence[str], kind: str, sizes: tuple[int, int]
) -> tuple[list[Placed], str]:
    """The objects of a scene of this kind, and its caption without the background."""
    name = names[0]
    if kind == "related":
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
        relation_word = "and" if rng.random() < UNRELATED_SHARE else relation
        return related(rng, names[:2], relation), f"{name} {relation_word} {names[1]}"
    if kind == "three":
        return spread(rng, names), f"{names[0]}, {names[1]} and {names[2]}"
    if kind == "counted":
        count = between(rng, 2, 5)
        return spread(rng, [name] * count), f"{NUMBERS[count]} {name}"
    size = {"small": (44, 64), "large": (112, 125)}.get(kind, sizes)
    rotation = {"upside down": 180.0, "tilted": float(rng.choice([-30, 30]))}.get(kind, 0.0)
    words = {"one": name, "fancy": name, "upside down": f"{name} upside down"}.get(kind, f"{kind} {name}")
    side = between(rng, *size)
    return [anywhere(rng, name, int(side * 0.75) if kind == "tilted" else side, rotation)], words


def fancy(rng: np.random.Generator, colour: str) -> tuple[Pixels, str]:
    """A background that is not flat, and its description."""
    other = list(COLOURS)[rng.integers(len(COLOURS))]
    return (
        (gradient(colour, other), f"{colour} to {other} background"),
        (striped(rng, colour), f"striped {colour} background"),
        (dotted(colour), f"dotted {colour} background"),
    )[rng.integers(3)]


def scene_of(atlas: Atlas, placed: Sequence[Placed], colour: str, words: str) -> Scene:
    """A scene of given objects on a flat background."""
    base = flat(colour)
    image, regions = compose(atlas, base, placed)
    return Scene(image, f"{words} on a {colour} background", words, base, tuple(placed), regions)


def without_occluded(atlas: Atlas, scene: Scene, mask: Mask) -> Scene:
    """The scene without captions and without the objects that a mask (128, 128) covers completely."""
    visible = np.unique(scene.regions[~mask])
    placed = [each for index, each in enumerate(scene.placed, 1) if index in visible]
    image, regions = compose(atlas, scene.base, placed)
    return Scene(image, "", "", scene.base, tuple(placed), regions)


def held_out_scenes(atlas: Atlas, count: int, seed: int = 0) -> list[Scene]:
    """Scenes of one object, of held-out pairs only, for evaluation; repeated if there are too few pairs."""
    rng = np.random.default_rng(seed)
    pairs = [(name, colour) for name in atlas.names for colour in COLOURS if held_out(name, colour)]
    chosen = [pairs[i] for i in np.resize(rng.permutation(len(pairs)), count if pairs else 0)]
    return [
        scene_of(atlas, [anywhere(rng, name, between(rng, 72, 121))], colour, name) for name, colour in chosen
    ]

"""Drawn training data: scenes of named emoji on flat backgrounds, with captions.

Glyphs come from the Noto Color Emoji font (OFL 1.1), names from Unicode. `glyphs.txt` beside this file fixes
which code points are used and under which names, since both change between releases.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SHA256 = (
    "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"  # Debian 12's fonts-noto-color-emoji
)
FONT_SIZE = 109  # the only size the font's bitmaps come in
SIZE = 128  # side of a scene
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


@dataclass(frozen=True)
class Scene:
    """One picture, uint8 (128, 128, 3), with a caption and a short caption that leaves the background out."""

    picture: np.ndarray
    caption: str
    short_caption: str


class GlyphError(RuntimeError):
    """The emoji font is missing or draws nothing."""


def caption_of(name: str, colour: str) -> str:
    """What a picture of one object is called."""
    return f"{name} on a {colour} background"


def held_out(name: str, colour: str) -> bool:
    """Whether a name on a background is kept from training (about one in ten), for evaluation."""
    return hashlib.sha256(f"{name}|{colour}".encode()).digest()[0] < 26


def known_glyphs() -> dict[str, int]:
    """name -> code point of every glyph of the data set, from glyphs.txt."""
    text = resources.files("models.training").joinpath("glyphs.txt").read_text()
    rows = (line.split(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: int(code, 16) for code, name in rows}


def draw_glyph(font: ImageFont.FreeTypeFont, code: int) -> Image.Image | None:
    """One glyph, cropped to what it covers, as RGBA; None where the font has none."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), chr(code), font=font, embedded_color=True)
    box = canvas.getbbox()
    return canvas.crop(box) if box else None


def load_font(path: Path = FONT) -> ImageFont.FreeTypeFont:
    """The emoji font. Raises GlyphError where it is not installed."""
    if not path.exists():
        raise GlyphError(f"{path} is missing: install Debian's fonts-noto-color-emoji")
    return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def find_glyphs(font: ImageFont.FreeTypeFont) -> dict[str, int]:
    """Scan Unicode for distinct coloured single-code-point glyphs: how glyphs.txt was made."""
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
            raise GlyphError(f"the font has no glyph for {name!r}: is it another release?")
        scale = size / max(glyph.size)
        return glyph.resize([max(1, round(s * scale)) for s in glyph.size], Image.Resampling.LANCZOS)


def compose(atlas: Atlas, colour: str, placed: Sequence[tuple[str, int, int, int]]) -> np.ndarray:
    """Draw (name, size, centre x, centre y) in turn on a background -> uint8 (128, 128, 3)."""
    canvas = Image.new("RGB", (SIZE, SIZE), COLOURS[colour])
    for name, size, x, y in placed:
        glyph = atlas.glyph(name, size)
        canvas.paste(glyph, (x - glyph.width // 2, y - glyph.height // 2), glyph)
    return np.asarray(canvas)


def _one(atlas: Atlas, rng: np.random.Generator, name: str, colour: str, sizes: tuple[int, int]) -> Scene:
    size = int(rng.integers(*sizes))
    low, high = size // 2 + 2, SIZE - size // 2 - 1
    x, y = (int(v) for v in rng.integers(low, high, size=2))
    picture = compose(atlas, colour, [(name, size, x, y)])
    return Scene(picture, caption_of(name, colour), name)


def _two(atlas: Atlas, rng: np.random.Generator, names: tuple[str, str], colour: str) -> Scene:
    size = int(rng.integers(48, 62))
    near, far, other = 33 + rng.integers(-2, 3), 95 + rng.integers(-2, 3), int(rng.integers(36, 92))
    beside = rng.random() < 0.5
    places = [(near, other), (far, other)] if beside else [(other, near), (other, far)]
    placed = [(name, size, int(x), int(y)) for name, (x, y) in zip(names, places, strict=True)]
    short = f"{names[0]} {'left of' if beside else 'above'} {names[1]}"
    return Scene(compose(atlas, colour, placed), f"{short} on a {colour} background", short)


def draw_scene(
    atlas: Atlas, rng: np.random.Generator, two: float = 0.08, sizes: tuple[int, int] = (92, 121)
) -> Scene:
    """A random training scene; never a held-out pair. `two`: share of scenes with two objects."""
    while True:
        names = [atlas.names[i] for i in rng.integers(len(atlas.names), size=2)]
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        double = rng.random() < two
        if any(held_out(name, colour) for name in names[: 1 + double]):
            continue
        if double:
            return _two(atlas, rng, (names[0], names[1]), colour)
        return _one(atlas, rng, names[0], colour, sizes)


def held_out_scenes(atlas: Atlas, count: int, seed: int = 0) -> list[Scene]:
    """Scenes of held-out pairs only, for evaluation."""
    rng = np.random.default_rng(seed)
    pairs = [(name, colour) for name in atlas.names for colour in COLOURS if held_out(name, colour)]
    chosen = rng.permutation(len(pairs))[:count]
    return [_one(atlas, rng, *pairs[i], sizes=(72, 121)) for i in chosen]

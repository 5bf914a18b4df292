"""Does a model draw what it is asked for? Named-object accuracy, and the autoencoder's fidelity.

Named-object accuracy: the border's median colour is the background; what differs from it is cropped, padded
to a square, and compared with every glyph of the font put on the same background and treated the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models.latent_diffusion import LatentDiffusion, to_uint8
from models.training.first_stage import to_x
from models.training.scenes import COLOURS, SIZE, Atlas, caption_of, held_out, held_out_scenes

SIDE = 24  # pixels a side at which glyphs are compared
DIFFERS = 30.0  # distance in RGB from which a pixel is not background

Pictures = np.ndarray  # uint8 (B, H, W, 3)


@dataclass(frozen=True)
class Accuracy:
    """Shares over all prompts."""

    count: int
    top1: float
    top5: float
    background: float


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise of two uint8 arrays, in dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / max(error, 1e-12)))


def background(picture: np.ndarray) -> np.ndarray:
    """The median colour of the border, float (3,)."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return np.median(border, axis=0).astype(np.float64)


def nearest_colour(colour: np.ndarray) -> str:
    """The nearest of the named colours."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(np.subtract(COLOURS[name], colour))))


def cut_out(picture: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Crop what differs from the background, pad to a square, shrink: float (SIDE, SIDE, 3)."""
    apart = np.linalg.norm(picture.astype(np.float64) - colour, axis=-1) > DIFFERS
    rows, columns = np.flatnonzero(apart.any(1)), np.flatnonzero(apart.any(0))
    if not len(rows):
        return np.broadcast_to(colour, (SIDE, SIDE, 3)).astype(np.float32)
    crop = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(crop.shape[:2])
    square = Image.new("RGB", (side, side), tuple(int(c) for c in colour.round()))
    square.paste(Image.fromarray(crop), ((side - crop.shape[1]) // 2, (side - crop.shape[0]) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)


class Judge:
    """Ranks all glyphs by their likeness to the object of a picture."""

    def __init__(self, atlas: Atlas) -> None:
        self.names = atlas.names
        glyphs = [np.asarray(atlas.glyph(name, 96).convert("RGBA")) for name in self.names]
        self._glyphs = [np.pad(g, [((SIZE - n) // 2, SIZE - n - (SIZE - n) // 2) for n in g.shape[:2]]
                               + [(0, 0)]) for g in glyphs]  # fmt: skip
        self._references: dict[tuple[int, ...], np.ndarray] = {}

    def rank(self, picture: np.ndarray) -> list[str]:
        """All names, the most alike first. picture uint8 (H, W, 3)."""
        colour = background(picture).round()
        object_ = cut_out(picture, colour).ravel()
        distance = np.square(self._on(colour) - object_).sum(axis=1)
        return [self.names[i] for i in distance.argsort()]

    def _on(self, colour: np.ndarray) -> np.ndarray:
        # Backgrounds come out of D a little off; steps of 16 keep the tables few and cost no accuracy.
        key = tuple(int(c) // 16 * 16 + 8 for c in colour)
        if key not in self._references:
            base = np.array(key, dtype=np.float64)
            self._references[key] = np.stack(
                [cut_out(self._put(g, base), base).ravel() for g in self._glyphs]
            )
        return self._references[key]

    @staticmethod
    def _put(glyph: np.ndarray, colour: np.ndarray) -> np.ndarray:
        alpha = glyph[..., 3:].astype(np.float64) / 255
        return (glyph[..., :3] * alpha + colour * (1 - alpha)).round().astype(np.uint8)


def held_out_prompts(names: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(name, colour) pairs that training never saw, in a fixed random order; repeated when too few."""
    pairs = [(name, colour) for name in names for colour in COLOURS if held_out(name, colour)]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[order[i % len(pairs)]] for i in range(count)] if pairs else []


def named_object_accuracy(
    judge: Judge, pairs: Sequence[tuple[str, str]], draw: Callable[[list[str]], Pictures], batch: int = 32
) -> Accuracy:
    """Draw "NAME on a COLOUR background" for each pair and judge it."""
    top1 = top5 = right = 0
    for start in range(0, len(pairs), batch):
        chunk = pairs[start : start + batch]
        pictures = draw([caption_of(*pair) for pair in chunk])
        for (name, colour), picture in zip(chunk, pictures, strict=True):
            ranked = judge.rank(picture)[:5]
            top1, top5 = top1 + (ranked[0] == name), top5 + (name in ranked)
            right += nearest_colour(background(picture)) == colour
    n = max(1, len(pairs))
    return Accuracy(len(pairs), top1 / n, top5 / n, right / n)


def to_pictures(x: Tensor) -> Pictures:
    """x (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def fidelity(bundle: LatentDiffusion, atlas: Atlas, count: int = 128, batch: int = 32) -> float:
    """PSNR in dB of D(E(x)) over held-out scenes, of their mean squared error."""
    scenes = np.stack([scene.picture for scene in held_out_scenes(atlas, count)])
    device = next(bundle.unet.parameters()).device
    again = [
        to_pictures(bundle.decode(bundle.encode(x.to(device))))
        for x in to_x(torch.from_numpy(scenes)).split(batch)
    ]
    return psnr(scenes, np.concatenate(again))


@torch.inference_mode()
def report(
    bundle: LatentDiffusion, names: Sequence[str], count: int, steps: int, guidance_scale: float
) -> Iterator[str]:
    """One sentence for each figure, as it is known. Picture i of the prompts has seed i."""
    atlas = Atlas()
    yield f"D(E(x)) on held-out scenes: {fidelity(bundle, atlas):.2f} dB"
    done = 0
    with tqdm(total=count, desc="prompts", leave=False) as bar:

        def draw(prompts: list[str]) -> Pictures:
            nonlocal done
            seeds = range(done, done + len(prompts))
            done += len(prompts)
            bar.update(len(prompts))
            return to_pictures(bundle.sample(prompts, seeds, steps, guidance_scale))

        accuracy = named_object_accuracy(Judge(atlas), held_out_prompts(names, count), draw)
    yield (
        f"named objects, {accuracy.count} held-out prompts of {len(names)} names, "
        f"{steps} steps, guidance {guidance_scale:g}:"
    )
    yield f"top-1 {accuracy.top1:.1%}, top-5 {accuracy.top5:.1%}, background {accuracy.background:.1%}"

"""Does a model draw what it is asked for? Named-object accuracy, and the autoencoder's fidelity.

Named-object accuracy: the border's median colour is the background; what differs from it is cropped, padded
to a square, and compared with every glyph of the font put on the same background and treated the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models.latent_diffusion import LatentDiffusion, to_uint8
from models.training.diffusion import draw_hole
from models.training.first_stage import to_x
from models.training.scenes import (
    COLOURS,
    RELATIONS,
    SIZE,
    Atlas,
    Scene,
    bounds,
    caption_of,
    held_out,
    held_out_scenes,
)

SIDE = 24  # pixels a side at which glyphs are compared
BATCH = 32  # pictures drawn at once
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
    left, top, right, bottom = bounds(apart)
    if not right:
        return np.broadcast_to(colour, (SIDE, SIDE, 3)).astype(np.float32)
    crop = picture[top:bottom, left:right]
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

    def rank(self, picture: np.ndarray, colour: np.ndarray | None = None) -> list[str]:
        """All names, the most alike first. picture uint8 (H, W, 3); colour: of its background, if known."""
        colour = (background(picture) if colour is None else colour).round()
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
    judge: Judge, pairs: Sequence[tuple[str, str]], draw: Callable[[list[str]], Pictures], batch: int = BATCH
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
def reconstructed(bundle: LatentDiffusion, pictures: Pictures) -> Pictures:
    """D(E(x)) of each."""
    batches = to_x(torch.from_numpy(pictures)).split(BATCH)
    return np.concatenate([to_pictures(bundle.decode(bundle.encode(x.to(bundle.device)))) for x in batches])


def fidelity(bundle: LatentDiffusion, atlas: Atlas, count: int = 128) -> float:
    """PSNR in dB of D(E(x)) over held-out scenes, of their mean squared error."""
    scenes = np.stack([scene.picture for scene in held_out_scenes(atlas, count)])
    return psnr(scenes, reconstructed(bundle, scenes))


class Painter:
    """Draws batches of pictures with a model, each with a seed of its own."""

    def __init__(self, bundle: LatentDiffusion, steps: int, guidance_scale: float, total: int) -> None:
        self.bundle = bundle
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.bar = tqdm(total=total, desc="pictures", leave=False)
        self.drawn = 0

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], beside: Sequence[Tensor] | None = None) -> Pictures:
        """One picture a prompt; beside: of each, as LatentDiffusion.beside() makes it."""
        parts = []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            chosen = prompts[part]
            seeds = range(self.drawn, self.drawn + len(chosen))
            given = None if beside is None else beside[part]
            x = self.bundle.sample(chosen, seeds, self.steps, self.guidance_scale, given)
            parts.append(to_pictures(x))
            self.drawn += len(chosen)
            self.bar.update(len(chosen))
        return np.concatenate(parts)

    def regions(self, maps: Sequence[np.ndarray]) -> list[Tensor]:
        """What stands beside the latent for label numbers (h, w) each."""
        return [
            self.bundle.concat_channels(*map.shape, torch.from_numpy(map.astype(np.int64))) for map in maps
        ]

    @torch.inference_mode()
    def around(self, pictures: Pictures, holes: np.ndarray) -> list[Tensor]:
        """What stands beside the latent for pictures with holes, bool (B, H, W)."""
        device, given = self.bundle.device, []
        for picture, hole in zip(pictures, holes, strict=True):
            x = to_x(torch.from_numpy(picture)[None]).to(device)
            known = self.bundle.encode_masked(x, torch.from_numpy(hole).to(device))
            given.append(self.bundle.concat_channels(*known.z.shape[1:], masked=known))
        return given


def right_objects(judge: Judge, names: Sequence[str], pictures: Pictures) -> float:
    """Share of pictures whose object is the one named."""
    return float(np.mean([judge.rank(p)[0] == name for name, p in zip(names, pictures, strict=True)]))


class Related(NamedTuple):
    """A prompt for two objects, and what its picture, cut in two along an axis, is to show on each side."""

    prompt: str
    axis: int
    names: tuple[str, str]


def related_prompts(names: Sequence[str], count: int, seed: int = 1) -> list[Related]:
    """Random pairs in random relations; of no name is the background held out."""
    rng, asked = np.random.default_rng(seed), []
    while len(asked) < count:
        pair = [names[i] for i in rng.permutation(len(names))[:2]]
        relation, colour = list(RELATIONS)[rng.integers(4)], list(COLOURS)[rng.integers(len(COLOURS))]
        if any(held_out(name, colour) for name in pair):
            continue  # two names together are new enough
        axis, direction = RELATIONS[relation]
        prompt = f"{pair[0]} {relation} {pair[1]} on a {colour} background"
        asked.append(Related(prompt, 1 - axis, tuple(pair[::direction])))
    return asked


def related_objects(judge: Judge, paint: Painter, names: Sequence[str], count: int) -> tuple[float, float]:
    """Shares of pictures of two objects that are both the right ones, and each on its side too."""
    asked, drawn, placed = related_prompts(names, count), 0, 0
    for (_, axis, pair), picture in zip(asked, paint([each.prompt for each in asked]), strict=True):
        colour = background(picture)
        found = tuple(judge.rank(part, colour)[0] for part in np.split(picture, 2, axis=axis))
        drawn, placed = drawn + (found in (pair, pair[::-1])), placed + (found == pair)
    return drawn / count, placed / count


def boxed_objects(
    judge: Judge, paint: Painter, names: Sequence[str], count: int
) -> tuple[float, float, float]:
    """Shares of pictures that show what the label of a box says, that fill the box, and that do both.

    The label is the prompt too, as it is wherever there is no other.
    """
    rng, f = np.random.default_rng(2), paint.bundle.spec.autoencoder.factor
    asked, maps, boxes = [], [], []
    for _ in range(count):
        side = f * int(rng.integers(8, 14))
        left, top = (f * int(v) for v in rng.integers(0, (SIZE - side) // f + 1, 2))
        number = int(rng.integers(len(names)))
        regions = np.zeros((SIZE // f, SIZE // f), np.int64)
        regions[top // f : (top + side) // f, left // f : (left + side) // f] = number + 1
        asked.append(names[number])
        maps.append(regions)
        boxes.append((left, top, left + side, top + side))
    pictures = paint(asked, paint.regions(maps))
    named = [judge.rank(p)[0] == name for name, p in zip(asked, pictures, strict=True)]
    placed = [overlap(extent(p), box) > 0.5 for p, box in zip(pictures, boxes, strict=True)]
    both = [a and b for a, b in zip(named, placed, strict=True)]
    return float(np.mean(named)), float(np.mean(placed)), float(np.mean(both))


def extent(picture: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what differs from the background."""
    return bounds(np.linalg.norm(picture.astype(np.float64) - background(picture), axis=-1) > DIFFERS)


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / max(sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - shared, 1)


def object_holes(scenes: Sequence[Scene], margin: int = 6) -> np.ndarray:
    """Over the object of each scene, bool (B, H, W)."""
    holes = np.zeros((len(scenes), SIZE, SIZE), bool)
    for hole, scene in zip(holes, scenes, strict=True):
        left, top, right, bottom = scene.boxes()[0]
        hole[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = True
    return holes


def random_holes(scenes: Sequence[Scene]) -> np.ndarray:
    """Over background and up to half of an object, bool (B, H, W)."""
    rng, holes = np.random.default_rng(3), []
    for scene in scenes:
        hole = draw_hole(rng, scene, kinds=(1, 2))
        while hole[scene.regions > 0].mean() > 0.5:
            hole = draw_hole(rng, scene, kinds=(1, 2))
        holes.append(hole)
    return np.stack(holes)


def filled_holes(paint: Painter, scenes: Sequence[Scene]) -> tuple[float, float]:
    """How much nearer than the mean of what is known a filling without a prompt comes, PSNR in dB.

    The mean over pictures, and of the squared error of all their pixels, which the worst of them make up.
    """
    pictures, holes = np.stack([scene.picture for scene in scenes]), random_holes(scenes)
    made = paint([""] * len(scenes), paint.around(pictures, holes))
    errors = np.array([hole_errors(*each) for each in zip(pictures, holes, made, strict=True)])
    errors = errors.clip(min=1.0)  # less than a level is none
    pooled = holes.sum((1, 2)) @ errors
    return tuple(float(10 * np.log10(e[..., 0] / e[..., 1]).mean()) for e in (errors, pooled))


def hole_errors(picture: np.ndarray, hole: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """Mean squared error inside a hole, bool (H, W): of the mean of what is known, and of what was made."""
    mean = picture[~hole].mean(axis=0).round()
    return tuple(float(np.square(fill - picture[hole]).mean()) for fill in (mean, made[hole].astype(float)))


def shuffled(bundle: LatentDiffusion) -> LatentDiffusion:
    """The model with the numbers of every weight of its UNet in another order: it has learned nothing."""
    other = bundle.copy(bundle.unet.dtype)
    generator = torch.Generator().manual_seed(0)
    for weight in other.unet.parameters():
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.copy_(weight.flatten()[order].view_as(weight))
    return other


@torch.inference_mode()
def report(
    bundle: LatentDiffusion, names: Sequence[str], count: int, steps: int, guidance_scale: float
) -> Iterator[str]:
    """One sentence for each figure, as it is known; reproducible on the same hardware."""
    atlas, part = Atlas(), max(count // 3, 1)
    judge = Judge(atlas)
    paint = Painter(bundle, steps, guidance_scale, count + 5 * part)
    yield f"{len(names)} names, {steps} steps, guidance {guidance_scale:g}"
    yield f"D(E(x)) on held-out scenes: {fidelity(bundle, atlas):.2f} dB"
    accuracy = named_object_accuracy(judge, held_out_prompts(names, count), paint)
    yield (
        f"named objects, {accuracy.count} held-out prompts: "
        f"top-1 {accuracy.top1:.1%}, top-5 {accuracy.top5:.1%}, background {accuracy.background:.1%}"
    )
    drawn, placed = related_objects(judge, paint, names, part)
    yield f"two objects in a relation, {part} prompts: both right {drawn:.1%}, and in place {placed:.1%}"
    named, placed, both = boxed_objects(judge, paint, names, part)
    yield (
        f"boxes, {part}: the right object {named:.1%}, IoU with the box over 0.5 {placed:.1%}, "
        f"both {both:.1%}"
    )
    scenes = held_out_scenes(Atlas(names), part)
    pictures = np.stack([scene.picture for scene in scenes])
    made = paint([s.caption for s in scenes], paint.around(pictures, object_holes(scenes)))
    right = right_objects(judge, [scene.names[0] for scene in scenes], made)
    yield f"inpainting with a prompt, {len(scenes)} holes: top-1 {right:.1%}"
    each, pooled = filled_holes(paint, scenes)
    yield (
        f"inpainting without, {len(scenes)} holes: PSNR against the mean colour {each:+.1f} dB a picture, "
        f"{pooled:+.1f} dB of all pixels"
    )
    paint.bundle = shuffled(bundle)
    accuracy = named_object_accuracy(judge, held_out_prompts(names, part), paint)
    yield f"the same with the UNet's weights shuffled: top-1 {accuracy.top1:.1%}, top-5 {accuracy.top5:.1%}"

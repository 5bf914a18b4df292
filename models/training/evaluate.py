"""Evaluation of a trained model: named-object accuracy by task, and the autoencoder's fidelity.

Named-object accuracy: an image counts as right if its object is most similar to the named glyph. The object
is what differs from the background, the median colour of the border; it is cropped, padded to a square and
compared with every glyph of the font on the same background.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models.latent_diffusion import LatentDiffusion, MaskedImage, to_uint8
from models.training.diffusion import draw_mask
from models.training.first_stage import to_x
from models.training.scenes import (
    COLOURS,
    RELATIONS,
    SIZE,
    Atlas,
    Floats,
    Integers,
    Mask,
    Pixels,
    Scene,
    bounds,
    caption_of,
    held_out,
    held_out_scenes,
)

COMPARED_SIDE = 24  # side in pixels at which glyphs are compared
BATCH = 32  # images drawn at once
BACKGROUND_DISTANCE = 30.0  # pixels further than this from the background's RGB belong to an object
MIN_SQUARED_ERROR = 1.0  # of pixel values 0 to 255: smaller errors count as this one

Images = Pixels  # (B, H, W, 3)


@dataclass(frozen=True)
class Accuracy:
    """Share of prompts whose image shows the named object (top 1, top 5) or the right background."""

    count: int
    top1: float
    top5: float
    background: float
    by_name: dict[str, float]  # top 1 for the prompts of each name

    def table(self) -> Iterator[str]:
        """Lines of names, by their accuracy, the lowest first."""
        for share in sorted(set(self.by_name.values())):
            names = sorted(name for name, value in self.by_name.items() if value == share)
            yield f"{share:.0%}: {', '.join(names)}"


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays, in dB."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float(10 * np.log10(255.0**2 / max(error, 1e-12)))


def background(image: Pixels) -> Floats:
    """The median colour of the border, (3,)."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    colour: Floats = np.median(border, axis=0).astype(np.float64)
    return colour


def nearest_colour(colour: Floats) -> str:
    """The name of the nearest of COLOURS."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(np.subtract(COLOURS[name], colour))))


def foreground(image: Pixels, colour: Floats) -> Mask:
    """The pixels that differ from a background colour, (H, W)."""
    differs: Mask = np.linalg.norm(image.astype(np.float64) - colour, axis=-1) > BACKGROUND_DISTANCE
    return differs


def cut_out(image: Pixels, colour: Floats) -> NDArray[np.float32]:
    """Crops the foreground, pads it to a square and resizes it: (COMPARED_SIDE, COMPARED_SIDE, 3)."""
    left, top, right, bottom = bounds(foreground(image, colour))
    if not right:
        return np.broadcast_to(colour, (COMPARED_SIDE, COMPARED_SIDE, 3)).astype(np.float32)
    crop = image[top:bottom, left:right]
    side = max(crop.shape[0], crop.shape[1])
    red, green, blue = (int(c) for c in colour.round())
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(Image.fromarray(crop), ((side - crop.shape[1]) // 2, (side - crop.shape[0]) // 2))
    return np.asarray(square.resize((COMPARED_SIDE, COMPARED_SIDE), Image.Resampling.BOX), dtype=np.float32)


class Judge:
    """Recognises the object in an image: ranks all glyphs by their similarity to it."""

    def __init__(self, atlas: Atlas) -> None:
        self.names = atlas.names
        glyphs = [np.asarray(atlas.glyph(name, 96).convert("RGBA")) for name in self.names]
        self._glyphs = [centred(glyph) for glyph in glyphs]
        self._tables: dict[tuple[int, ...], NDArray[np.float32]] = {}  # by background

    def rank(self, image: Pixels, colour: Floats | None = None) -> list[str]:
        """All names, the most similar first.

        image: (H, W, 3); colour: of its background; None: measured.
        """
        colour = (background(image) if colour is None else colour).round()
        object_ = cut_out(image, colour).ravel()
        distance = np.square(self._references(colour) - object_).sum(axis=1)
        return [self.names[i] for i in distance.argsort()]

    def _references(self, colour: Floats) -> NDArray[np.float32]:
        """Every glyph on a background, cut out: (glyphs, COMPARED_SIDE * COMPARED_SIDE * 3)."""
        # Decoded backgrounds vary a little. Rounding to steps of 16 keeps tables few and costs no accuracy.
        key = tuple(int(c) // 16 * 16 + 8 for c in colour)
        if key not in self._tables:
            base = np.array(key, dtype=np.float64)
            self._tables[key] = np.stack([cut_out(self._put(g, base), base).ravel() for g in self._glyphs])
        return self._tables[key]

    @staticmethod
    def _put(glyph: Pixels, colour: Floats) -> Pixels:
        alpha = glyph[..., 3:].astype(np.float64) / 255
        blended: Pixels = (glyph[..., :3] * alpha + colour * (1 - alpha)).round().astype(np.uint8)
        return blended


def centred(glyph: Pixels) -> Pixels:
    """A glyph in the middle of a transparent canvas: (SIZE, SIZE, 4)."""
    margins = [((SIZE - n) // 2, SIZE - n - (SIZE - n) // 2) for n in glyph.shape[:2]]
    return np.pad(glyph, [*margins, (0, 0)])


def held_out_prompts(names: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Held-out (name, colour) pairs in a fixed random order; repeated if there are too few."""
    pairs = [(name, colour) for name in names for colour in COLOURS if held_out(name, colour)]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[order[i % len(pairs)]] for i in range(count)] if pairs else []


def named_object_accuracy(
    judge: Judge, pairs: Sequence[tuple[str, str]], draw: Callable[[list[str]], Images], batch: int = BATCH
) -> Accuracy:
    """Draws "NAME on a COLOUR background" for each (name, colour) pair and ranks the glyphs.

    draw: prompts -> one image per prompt.
    """
    top1 = top5 = right = 0
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(pairs), batch):
        chunk = pairs[start : start + batch]
        images = draw([caption_of(*pair) for pair in chunk])
        for (name, colour), image in zip(chunk, images, strict=True):
            ranked = judge.rank(image)[:5]
            found[name].append(ranked[0] == name)
            top1, top5 = top1 + (ranked[0] == name), top5 + (name in ranked)
            right += nearest_colour(background(image)) == colour
    n = max(1, len(pairs))
    by_name = {name: sum(each) / len(each) for name, each in found.items()}
    return Accuracy(len(pairs), top1 / n, top5 / n, right / n, by_name)


def to_images(x: Tensor) -> Images:
    """x (B, 3, H, W) in [-1, 1] -> (B, H, W, 3)."""
    images: Images = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
    return images


@torch.inference_mode()
def reconstructed(model: LatentDiffusion, images: Images) -> Images:
    """D(E(x)) of each image."""
    batches = to_x(torch.from_numpy(images)).split(BATCH)
    return np.concatenate([to_images(model.decode(model.encode(x.to(model.device)))) for x in batches])


def fidelity(model: LatentDiffusion, atlas: Atlas, count: int = 128) -> float:
    """PSNR in dB of D(E(x)) over `count` held-out scenes, from the mean squared error over all of them."""
    scenes = np.stack([scene.image for scene in held_out_scenes(atlas, count)])
    return psnr(scenes, reconstructed(model, scenes))


class Painter:
    """Draws images with a model in batches, every image with a new seed."""

    def __init__(
        self, model: LatentDiffusion, steps: int, guidance_scale: float, total: int, sampler: str = "ddim"
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.bar = tqdm(total=total, desc="images", leave=False)
        self.drawn = 0

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], concat_channels: Sequence[Tensor] | None = None) -> Images:
        """One image per prompt. concat_channels: one per prompt, from for_layouts() or for_inpainting()."""
        parts = []
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            chosen = prompts[part]
            seeds = range(self.drawn, self.drawn + len(chosen))
            given = None if concat_channels is None else concat_channels[part]
            x = self.model.sample(chosen, seeds, self.steps, self.guidance_scale, given, sampler=self.sampler)
            parts.append(to_images(x))
            self.drawn += len(chosen)
            self.bar.update(len(chosen))
        return np.concatenate(parts)

    def for_layouts(self, maps: Sequence[Integers]) -> list[Tensor]:
        """Concat channels for maps of label numbers, (h, w) each."""
        made = []
        for map in maps:
            h, w = map.shape
            made.append(self._concat_channels(h, w, regions=torch.from_numpy(map.astype(np.int64))))
        return made

    @torch.inference_mode()
    def for_inpainting(self, images: Images, masks: Mask) -> list[Tensor]:
        """Concat channels for images (B, H, W, 3) and masks (B, H, W)."""
        device, made = self.model.device, []
        for image, mask in zip(images, masks, strict=True):
            x = to_x(torch.from_numpy(image)[None]).to(device)
            masked = self.model.encode_masked(x, torch.from_numpy(mask).to(device))
            h, w = masked.z.shape[1:]
            made.append(self._concat_channels(h, w, masked=masked))
        return made

    def _concat_channels(
        self, h: int, w: int, regions: Tensor | None = None, masked: MaskedImage | None = None
    ) -> Tensor:
        channels = self.model.concat_channels(h, w, regions, masked)
        if channels is None:
            raise ValueError(f"{self.model.spec.name} takes neither masks nor layouts")
        return channels


def right_objects(judge: Judge, names: Sequence[str], images: Images) -> float:
    """Share of images whose most similar glyph is the named one."""
    return float(np.mean([judge.rank(p)[0] == name for name, p in zip(names, images, strict=True)]))


class Related(NamedTuple):
    """A prompt for two objects in a relation, and the name that each half of the image should show."""

    prompt: str
    axis: int  # along which the image is halved
    names: tuple[str, str]


def related_prompts(names: Sequence[str], count: int, seed: int = 1) -> list[Related]:
    """Random pairs of names in random relations, on backgrounds that neither name is held out with."""
    rng = np.random.default_rng(seed)
    related: list[Related] = []
    while len(related) < count:
        pair = [names[i] for i in rng.permutation(len(names))[:2]]
        relation, colour = list(RELATIONS)[rng.integers(4)], list(COLOURS)[rng.integers(len(COLOURS))]
        if any(held_out(name, colour) for name in pair):
            continue  # only the pair of names is new to the model
        axis, direction = RELATIONS[relation]
        prompt = f"{pair[0]} {relation} {pair[1]} on a {colour} background"
        first, second = pair[::direction]
        related.append(Related(prompt, 1 - axis, (first, second)))
    return related


def related_objects(judge: Judge, paint: Painter, names: Sequence[str], count: int) -> tuple[float, float]:
    """Shares of images that show both objects, and that show each object on its side."""
    prompts, drawn, placed = related_prompts(names, count), 0, 0
    for (_, axis, pair), image in zip(prompts, paint([each.prompt for each in prompts]), strict=True):
        colour = background(image)
        found = tuple(judge.rank(part, colour)[0] for part in np.split(image, 2, axis=axis))
        drawn, placed = drawn + (found in (pair, pair[::-1])), placed + (found == pair)
    return drawn / count, placed / count


def boxed_objects(
    judge: Judge, paint: Painter, names: Sequence[str], count: int
) -> tuple[float, float, float]:
    """Shares of images that show the box's object, whose object fills the box, and both.

    The prompt is the box's label, as it is in requests without a prompt.
    """
    rng, f = np.random.default_rng(2), paint.model.spec.autoencoder.factor
    labels, maps, boxes = [], [], []
    for _ in range(count):
        side = f * int(rng.integers(8, 14))
        left, top = (f * int(v) for v in rng.integers(0, (SIZE - side) // f + 1, 2))
        number = int(rng.integers(len(names)))
        regions = np.zeros((SIZE // f, SIZE // f), np.int64)
        regions[top // f : (top + side) // f, left // f : (left + side) // f] = number + 1
        labels.append(names[number])
        maps.append(regions)
        boxes.append((left, top, left + side, top + side))
    images = paint(labels, paint.for_layouts(maps))
    named = [judge.rank(p)[0] == name for name, p in zip(labels, images, strict=True)]
    placed = [overlap(extent(p), box) > 0.5 for p, box in zip(images, boxes, strict=True)]
    both = [a and b for a, b in zip(named, placed, strict=True)]
    return float(np.mean(named)), float(np.mean(placed)), float(np.mean(both))


def extent(image: Pixels) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the foreground."""
    return bounds(foreground(image, background(image)))


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / max(sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - shared, 1)


def object_masks(scenes: Sequence[Scene], margin: int = 6) -> Mask:
    """Masks over the object of each scene, (B, H, W)."""
    masks = np.zeros((len(scenes), SIZE, SIZE), bool)
    for mask, scene in zip(masks, scenes, strict=True):
        left, top, right, bottom = scene.boxes()[0]
        mask[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = True
    return masks


def random_masks(scenes: Sequence[Scene]) -> Mask:
    """Masks over background and at most half of each object, (B, H, W)."""
    rng, masks = np.random.default_rng(3), []
    for scene in scenes:
        mask = draw_mask(rng, scene, kinds=(1, 2))
        while mask[scene.regions > 0].mean() > 0.5:
            mask = draw_mask(rng, scene, kinds=(1, 2))
        masks.append(mask)
    return np.stack(masks)


def inpainting_gain(paint: Painter, scenes: Sequence[Scene]) -> tuple[float, float]:
    """Gain in PSNR, in dB, of inpainting without a prompt over filling masks with the mean unmasked colour.

    Two figures: the mean of the images' gains, and the gain in squared error over all masked pixels, in which
    the worst images count most.
    """
    images, masks = np.stack([scene.image for scene in scenes]), random_masks(scenes)
    made = paint([""] * len(scenes), paint.for_inpainting(images, masks))
    errors = np.array([masked_errors(*each) for each in zip(images, masks, made, strict=True)])
    errors = errors.clip(min=MIN_SQUARED_ERROR)
    pooled = masks.sum((1, 2)) @ errors
    each, of_all = (float(10 * np.log10(e[..., 0] / e[..., 1]).mean()) for e in (errors, pooled))
    return each, of_all


def masked_errors(image: Pixels, mask: Mask, made: Pixels) -> tuple[float, float]:
    """Mean squared errors inside a mask (H, W): of the mean unmasked colour, and of the generated image."""
    mean = image[~mask].mean(axis=0).round()
    by_mean, by_model = (np.square(fill - image[mask]) for fill in (mean, made[mask].astype(float)))
    return float(by_mean.mean()), float(by_model.mean())


def shuffled(model: LatentDiffusion) -> LatentDiffusion:
    """The model with the values of each UNet weight shuffled: a baseline without learned structure."""
    if model.unet is None:
        raise ValueError(f"{model.spec.name} has no UNet")
    other = model.copy(model.unet.dtype)
    assert other.unet is not None
    generator = torch.Generator().manual_seed(0)
    for weight in other.unet.parameters():
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        weight.copy_(weight.flatten()[order].view_as(weight))
    return other


@torch.inference_mode()
def report(
    model: LatentDiffusion,
    names: Sequence[str],
    count: int,
    steps: int,
    guidance_scale: float,
    sampler: str = "ddim",
) -> Iterator[str]:
    """Yields one line per figure; reproducible on the same hardware."""
    atlas, part = Atlas(), max(count // 3, 1)
    judge = Judge(atlas)
    paint = Painter(model, steps, guidance_scale, count + 5 * part, sampler)
    yield f"{len(names)} names, {sampler}, {steps} steps, guidance {guidance_scale:g}"
    yield f"D(E(x)) on held-out scenes: {fidelity(model, atlas):.2f} dB"
    accuracy = named_object_accuracy(judge, held_out_prompts(names, count), paint)
    yield (
        f"named objects, {accuracy.count} held-out prompts: "
        f"top-1 {accuracy.top1:.1%}, top-5 {accuracy.top5:.1%}, background {accuracy.background:.1%}"
    )
    yield "the same by name, top-1:"
    yield from accuracy.table()
    drawn, placed = related_objects(judge, paint, names, part)
    yield f"two objects in a relation, {part} prompts: both right {drawn:.1%}, each on its side {placed:.1%}"
    named, placed, both = boxed_objects(judge, paint, names, part)
    yield (
        f"boxes, {part}: the right object {named:.1%}, IoU with the box over 0.5 {placed:.1%}, "
        f"both {both:.1%}"
    )
    scenes = held_out_scenes(Atlas(names), part)
    images = np.stack([scene.image for scene in scenes])
    made = paint([s.caption for s in scenes], paint.for_inpainting(images, object_masks(scenes)))
    right = right_objects(judge, [scene.names[0] for scene in scenes], made)
    yield f"inpainting with a prompt, {len(scenes)} masks: top-1 {right:.1%}"
    each, pooled = inpainting_gain(paint, scenes)
    yield (
        f"inpainting without a prompt, {len(scenes)} masks: PSNR against the mean colour "
        f"{each:+.1f} dB per image, {pooled:+.1f} dB over all pixels"
    )
    paint.model = shuffled(model)
    accuracy = named_object_accuracy(judge, held_out_prompts(names, part), paint)
    yield f"the same with the UNet's weights shuffled: top-1 {accuracy.top1:.1%}, top-5 {accuracy.top5:.1%}"

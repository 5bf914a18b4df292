"""Evaluation of a ControlNet for outlines: whether objects fill the outline that they are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from models.latent_diffusion import LatentDiffusion
from models.networks.control_net import ControlNet
from models.sampling.denoiser import Denoiser
from models.training.control import ControlledUNet, outlines
from models.training.evaluate import (
    BATCH,
    Images,
    Judge,
    background,
    foreground,
    reconstructed,
    right_objects,
    to_images,
)
from models.training.scenes import Atlas, Integers, Mask, Pixels, Scene, held_out_scenes

TEST_SEED = 21
GOOD_OVERLAP = 0.6  # intersection over union of an object with the inside of its outline


@torch.inference_mode()
def draw(
    model: LatentDiffusion,
    prompts: Sequence[str],
    steps: int,
    control: ControlNet | None = None,
    images: Tensor | None = None,
) -> Images:
    """One image per prompt, image i with seed i. images: (B, 3, H, W) in [0, 1], for `control`."""
    parts, unet, scale = [], model.unet, model.spec.defaults.guidance_scale
    assert unet is not None
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        if control is not None and images is not None:
            hint = control.embed_hint(images[part].to(model.device, control.dtype))
            model.denoiser = Denoiser(ControlledUNet(unet, control, hint), model.schedule)
        chosen = prompts[part]
        seeds = range(start, start + len(chosen))
        parts.append(to_images(model.sample(chosen, seeds, steps, scale)))
    model.denoiser = Denoiser(unet, model.schedule)
    return np.concatenate(parts)


def filled(mask: Mask) -> Mask:
    """A mask (H, W) with its holes: all pixels that cannot be reached from outside."""
    image = Image.fromarray(np.pad(mask, 1).astype(np.uint8)).copy()  # the array's pixels are read-only
    ImageDraw.floodfill(image, (0, 0), 2)
    inside: Mask = np.asarray(image)[1:-1, 1:-1] != 2
    return inside


def object_of(image: Pixels) -> Mask:
    """The pixels of the object, holes included: (H, W)."""
    return filled(foreground(image, background(image)))


def mask_overlap(a: Mask, b: Mask) -> float:
    """Intersection over union."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def overlaps(scenes: Sequence[Scene], images: Images) -> Integers:
    """Of each image's object with the inside of its scene's outline: (B,)."""
    pairs = zip(scenes, images, strict=True)
    return np.array([mask_overlap(filled(scene.regions > 0), object_of(image)) for scene, image in pairs])


def outlines_of(scenes: Sequence[Scene]) -> Tensor:
    """The control images of scenes, (B, 3, 128, 128) in [0, 1]."""
    return outlines(torch.from_numpy(np.stack([scene.regions > 0 for scene in scenes])))


def report(
    model: LatentDiffusion, control: ControlNet, names: Sequence[str], count: int, steps: int
) -> Iterator[str]:
    """Yields one line per figure; reproducible on the same hardware."""
    scenes, judge = held_out_scenes(Atlas(names), count, TEST_SEED), Judge(Atlas())
    prompts, drawn = [scene.caption for scene in scenes], np.stack([scene.image for scene in scenes])
    sets = {
        "drawn scenes": drawn,
        "D(E(x)) of drawn scenes": reconstructed(model, drawn),
        "without control": draw(model, prompts, steps),
        "with the outline": draw(model, prompts, steps, control, outlines_of(scenes)),
        "with the outline, no prompt": draw(model, [""] * count, steps, control, outlines_of(scenes)),
    }
    for name, images in sets.items():
        found = overlaps(scenes, images)
        right = right_objects(judge, [scene.names[0] for scene in scenes], images)
        yield (
            f"{name}: IoU with the outline's inside over {GOOD_OVERLAP} in "
            f"{np.mean(found > GOOD_OVERLAP):.1%} of {count} (median {np.median(found):.2f}); "
            f"the right object {right:.1%}"
        )


def sheets(
    model: LatentDiffusion, control: ControlNet, names: Sequence[str], steps: int
) -> Iterator[tuple[str, Image.Image]]:
    """A sheet of outlines and what was drawn in them: of their own object, and of another."""
    from models.training.sheet import COLUMNS, lay_out

    scenes = held_out_scenes(Atlas(names), 2 * COLUMNS, seed=5)
    rows: list[Images] = []
    captions: list[str] = []
    for part, others in (scenes[:COLUMNS], scenes[:COLUMNS]), (scenes[COLUMNS:], scenes[:COLUMNS]):
        prompts, images = [scene.caption for scene in others], outlines_of(part)
        rows += [to_images(images * 2 - 1), draw(model, prompts, steps, control, images)]
        captions += [*[""] * COLUMNS, *prompts]
    yield "outlines", lay_out(np.concatenate(rows), captions, COLUMNS)

"""Training of a latent diffusion model with its text encoder: L_LDM (Rombach et al. 2021, equation 2)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from models.conditioning.conditioner import LayoutProjection, TextConditioner
from models.conditioning.text_encoder import TextEncoder
from models.dtypes import mixed_precision
from models.latent_diffusion import LatentDiffusion
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from models.sampling.schedule import Schedule
from models.spec import ScheduleSpec, TextSpec, UNetSpec
from models.training.first_stage import to_x
from models.training.scenes import (
    GRAY,
    SIZE,
    Atlas,
    Floats,
    Mask,
    Pixels,
    Scene,
    draw_scene,
    without_occluded,
)
from models.training.trainer import Budget, Trainer

CHUNK = 64  # scenes drawn and encoded at once
# Shares of the training data:
SHORT_SHARE = 0.1  # of captions: without the background
EMPTY_SHARE = 0.1  # of captions: replaced by an empty one, for classifier-free guidance
MASKED_SHARE = 0.4  # of scenes: also encoded with a mask
UNCAPTIONED_SHARE = 0.8  # of masked scenes: no caption, and no object that the mask covers completely
UNCAPTIONED_KINDS = {"one": 0.8, "related": 0.2}  # kinds of these scenes, as in scenes.KINDS
UNCAPTIONED_MASKS = (0, 1, 1, 2, 2)  # kinds of their masks, as in draw_mask(); most cover part of an object
MASK_USED_SHARE = 0.9  # of captioned masked scenes: trained with the mask; uncaptioned ones always are
LAYOUT_SHARE = 0.15  # of scenes: trained with their layout, half as boxes and half as silhouettes
UNIFORM_SHARE = 0.3  # of updates: timesteps are drawn uniformly
UNMASKED_WEIGHT = 0.1  # weight of the error outside the mask, where the image is given
# The spatial-relations phase of a run; see train().
RELATIONS_PHASE = (0.25, 0.45)  # its begin and end, as shares of the run
RELATIONS_EVERY = 4  # after the phase, every fourth update is like those in it
RELATIONS_MAX_ALPHA_BAR = 0.25  # timesteps in the phase have an alpha_bar below this
UNET_INPUT, UNET_OUTPUT = "input_blocks.0.0.weight", ("out.2.weight", "out.2.bias")


class SceneNetwork(nn.Module):
    """The UNet, its text encoder and its layout projection, trained together."""

    def __init__(
        self, unet: UNetSpec, text: TextSpec, layout_channels: int, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self.unet = UNet(unet)
        self.text_encoder = TextEncoder(text, tokenizer)
        self.layout = LayoutProjection(text.width, layout_channels)

    def forward(self, z_t: Tensor, t: Tensor, batch: Batch, names: Tensor) -> Tensor:
        """z_t (B, C, h, w), t (B,), names (K, L): token ids of all names -> v (B, C, h, w)."""
        present, regions = batch.regions.unique(return_inverse=True)
        vectors = self.layout(self.text_encoder, names[(present.long() - 1).clamp(min=0)])
        table = vectors * (present > 0)[:, None]  # (labels present, channels); no name: zeros
        layout = table[regions].movedim(-1, 1)  # (B, channels, h, w)
        x = torch.cat([z_t, batch.mask, batch.masked, layout.to(z_t.dtype)], dim=1)
        v: Tensor = self.unet(x, t, self.text_encoder(batch.ids).tokens)
        return v


class Batch(NamedTuple):
    """The data of one update."""

    z: Tensor  # (B, C, h, w), scaled
    ids: Tensor  # (B, L), token ids of the caption, which may be empty
    mask: Tensor  # (B, 1, h, w), 1 where the image is to be repainted
    masked: Tensor  # (B, C, h, w), scaled latent of the image, which is gray where the mask is 1
    regions: Tensor  # (B, h, w), number of the name at each cell, from 1; 0: no name


class Chunk(NamedTuple):
    """N = CHUNK scenes, of which the first M have a mask."""

    images: Pixels  # (N, 128, 128, 3)
    masked: Pixels  # (M, 128, 128, 3), with gray under the masks
    masks: Mask  # (M, 128, 128)
    captions: tuple[str, ...]  # 2 N: the caption and the short caption of each scene in turn
    boxes: NDArray[np.int16]  # (N, h, w), number of the name at each cell, from 1; 0: no name
    regions: NDArray[np.int16]  # (N, h, w), the same for silhouettes instead of boxes
    counts: NDArray[np.int64]  # (N,), objects in each scene


class Chunks(Dataset[Chunk]):
    """Drawn scenes in chunks. A chunk does not depend on the process that draws it."""

    def __init__(self, names: Sequence[str], count: int, seed: int, factor: int) -> None:
        self.atlas, self.count, self.seed, self.factor = Atlas(names), count, seed, factor
        self.number = {name: index for index, name in enumerate(names, 1)}

    def __len__(self) -> int:
        return -(-self.count // CHUNK)

    def __getitem__(self, index: int) -> Chunk:
        rng = np.random.default_rng([self.seed, index])
        masked_count = round(MASKED_SHARE * CHUNK)
        uncaptioned = round(UNCAPTIONED_SHARE * masked_count)
        scenes = [draw_scene(self.atlas, rng, kinds=UNCAPTIONED_KINDS) for _ in range(uncaptioned)]
        scenes += [draw_scene(self.atlas, rng) for _ in range(CHUNK - uncaptioned)]
        masks = np.stack(
            [draw_mask(rng, scene, UNCAPTIONED_MASKS) for scene in scenes[:uncaptioned]]
            + [draw_mask(rng, scene) for scene in scenes[uncaptioned:masked_count]]
        )
        for index in range(uncaptioned):
            scenes[index] = without_occluded(self.atlas, scenes[index], masks[index])
        images = np.stack([scene.image for scene in scenes])
        maps = [layouts(scene, self.number, self.factor) for scene in scenes]
        boxes, regions = (np.stack(part) for part in zip(*maps, strict=True))
        return Chunk(
            images,
            np.where(masks[:, :, :, None], GRAY, images[:masked_count]).astype(np.uint8),
            masks,
            tuple(text for scene in scenes for text in (scene.caption, scene.short_caption)),
            boxes,
            regions,
            np.array([len(scene.placed) for scene in scenes]),
        )


def draw_latents(
    autoencoder: Autoencoder,
    encoder: TextEncoder,
    names: Sequence[str],
    count: int,
    seed: int,
    device: torch.device,
    workers: int = 0,
) -> dict[str, Tensor]:
    """Draws N scenes in `workers` processes and encodes them: name -> tensor, on the device.

    latents, masked: (N, C, h, w), unscaled bfloat16
    ids: (N, 2, L), token ids of both captions
    masks: (N, 1, h, w), 1 everywhere for scenes without a mask; has_mask: (N,)
    boxes, regions: (N, h, w), number of the name at each cell, from 1; 0: no name
    counts: (N,), objects in each scene
    gray: (1, C, h, w), latent of a fully masked image
    names: (K, L), token ids of all names
    """
    factor = autoencoder.spec.factor
    parts: dict[str, list[Tensor]] = defaultdict(list)

    def encode(images: Pixels) -> Tensor:
        x = to_x(torch.from_numpy(images)).to(device)
        with torch.no_grad(), mixed_precision(device):
            return autoencoder.encode(x).bfloat16()

    gray = encode(np.full((1, SIZE, SIZE, 3), GRAY, np.uint8))
    chunks: DataLoader[Chunk] = DataLoader(
        Chunks(names, count, seed, factor), batch_size=None, num_workers=workers, collate_fn=identity
    )
    for chunk in tqdm(chunks, desc="latents", unit_scale=CHUNK, unit="scene"):
        masked = len(chunk.masks)
        masks = torch.ones(CHUNK, 1, SIZE // factor, SIZE // factor, dtype=torch.uint8)
        masks[:masked, 0] = max_pool2d(torch.from_numpy(chunk.masks).float(), factor).byte()
        parts["latents"].append(encode(chunk.images))
        parts["masked"].append(torch.cat([encode(chunk.masked), gray.expand(CHUNK - masked, -1, -1, -1)]))
        parts["masks"].append(masks)
        parts["has_mask"].append(torch.arange(CHUNK) < masked)
        parts["ids"].append(encoder.tokenize(chunk.captions).view(CHUNK, 2, -1))
        parts["boxes"].append(torch.from_numpy(chunk.boxes))
        parts["regions"].append(torch.from_numpy(chunk.regions))
        parts["counts"].append(torch.from_numpy(chunk.counts))
    data = {key: torch.cat(values).to(device) for key, values in parts.items()}
    return data | {"gray": gray, "names": encoder.tokenize(names).to(device)}


def identity(chunk: Any) -> Any:
    """Collate function of the loader: leaves chunks as they are."""
    return chunk


def draw_mask(rng: np.random.Generator, scene: Scene, kinds: Sequence[int] = (0, 1, 2)) -> Mask:
    """The pixels to repaint, (128, 128).

    Kinds: 0 a box around an object, 1 a random box, 2 a thick stroke.
    """
    kind, mask = kinds[int(rng.integers(len(kinds)))], Image.new("1", (SIZE, SIZE))
    draw = ImageDraw.Draw(mask)
    if kind == 0:
        left, top, right, bottom = scene.boxes()[rng.integers(len(scene.names))]
        margins = rng.integers(0, 12, 4)
        draw.rectangle((left - margins[0], top - margins[1], right + margins[2], bottom + margins[3]), fill=1)
    elif kind == 1:
        width, height = rng.integers(24, 97, 2)
        left, top = rng.integers(0, SIZE - width + 1), rng.integers(0, SIZE - height + 1)
        draw.rectangle((left, top, left + width, top + height), fill=1)
    else:
        points = [tuple(map(int, point)) for point in rng.integers(0, SIZE, (rng.integers(2, 5), 2))]
        draw.line(points, fill=1, width=int(rng.integers(16, 41)), joint="curve")
    return np.asarray(mask)


def layouts(
    scene: Scene, number: Mapping[str, int], factor: int
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Boxes and silhouettes of a scene at the latent's size.

    number: name -> its number, from 1. Each (h, w): the number at each cell, 0: no name.
    """
    numbers = np.array([0, *(number[name] for name in scene.names)], np.int16)
    boxes = np.zeros((SIZE, SIZE), np.int16)
    for index, (left, top, right, bottom) in enumerate(scene.boxes(), 1):
        boxes[top:bottom, left:right] = numbers[index]
    middle = slice(factor // 2, None, factor)
    return boxes[middle, middle], numbers[scene.regions[middle, middle]]


def batches(
    data: dict[str, Tensor], scale: float, empty: Tensor, size: int, seed: int, chosen: Tensor
) -> Iterator[Batch]:
    """Endless random batches: captions shortened or dropped, masks and layouts used at random.

    data: from draw_latents(); scale: the autoencoder's scale_factor; empty (1, L): token ids of the empty
    caption; size: scenes per batch; chosen (N,), bool: the scenes to train on.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen, device = chosen.nonzero()[:, 0], empty.device
    gray = data["gray"].float() * scale

    def chance(share: float, size: int) -> Tensor:
        return (torch.rand(size, generator=generator) < share).to(device)

    while True:
        for part in torch.randperm(len(chosen), generator=generator).to(device).split(size):
            index, n = chosen[part], len(part)
            # Uncaptioned scenes lack the objects under their mask; without it they would teach empty images.
            uncaptioned = (data["ids"][index, 0] == empty).all(1)
            masked = data["has_mask"][index] & (chance(MASK_USED_SHARE, n) | uncaptioned)
            with_layout, as_boxes = chance(LAYOUT_SHARE, n), chance(0.5, n)
            unconditional = chance(EMPTY_SHARE, n)
            ids = data["ids"][index, chance(SHORT_SHARE, n).long()]
            regions = torch.where(as_boxes[:, None, None], data["boxes"][index], data["regions"][index])
            show_layout = (with_layout & ~unconditional)[:, None, None]
            show_masked = masked[:, None, None, None]
            yield Batch(
                data["latents"][index].float() * scale,
                torch.where(unconditional[:, None], empty, ids),
                torch.where(show_masked, data["masks"][index].float(), 1.0),
                torch.where(show_masked, data["masked"][index].float() * scale, gray),
                torch.where(show_layout, regions, 0),
            )


def mask_weights(batch: Batch) -> Tensor:
    """Weight of each cell's error, (B, 1, h, w): mean 1 in each image, larger inside its mask."""
    weight = batch.mask.clamp(min=UNMASKED_WEIGHT)
    return weight / weight.mean((2, 3), keepdim=True)


def timestep_density(alpha_bar: Floats) -> Tensor:
    """How often training draws each timestep: (T,), sums to 1.

    The logit-normal density of Esser et al. 2024 (section 3.1) over the angle between signal and noise:
    shapes are decided at middle noise levels, so most updates go there. UNIFORM_SHARE is spread over all
    timesteps, because the positions of objects are decided at the highest noise levels.
    """
    angle = np.arccos(np.sqrt(alpha_bar)) / (np.pi / 2)  # 0: no noise, 1: noise only
    logit = np.log(angle / (1 - angle))
    density = np.exp(-0.5 * logit**2) / (angle * (1 - angle)) * np.gradient(angle)
    density = (1 - UNIFORM_SHARE) * density / density.sum() + UNIFORM_SHARE / len(density)
    return torch.from_numpy(density)


def v_error(
    predict: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    alpha_bar: Tensor,
    density: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted v (Salimans and Ho 2022) at random timesteps.

    predict: z_t (B, C, h, w), t (B,) -> v (B, C, h, w); z: (B, C, h, w), scaled; alpha_bar, density: (T,);
    weight: of each cell's error, (B, 1, h, w) with mean 1; None: all alike. Returns a scalar.
    """
    quantiles = (torch.arange(len(z)) + torch.rand(len(z))).to(z.device) / len(z)  # stratified
    t = torch.searchsorted(density.cumsum(0), quantiles).clamp(max=len(density) - 1)
    ab = alpha_bar[t][:, None, None, None]
    eps = torch.randn_like(z)
    v = ab.sqrt() * eps - (1 - ab).sqrt() * z
    error = (predict(ab.sqrt() * z + (1 - ab).sqrt() * eps, t).float() - v).square()
    return (error if weight is None else weight * error).mean()


def networks_of(model: LatentDiffusion) -> tuple[UNet, TextEncoder]:
    """The UNet and the text encoder of a text-to-image model. Raises ValueError for another model."""
    if model.unet is None or not isinstance(model.conditioner, TextConditioner):
        raise ValueError(f"{model.spec.name} is not a text-to-image model")
    return model.unet, model.conditioner.encoders[0]


def start_from(network: SceneNetwork, model: LatentDiffusion) -> None:
    """Copies the weights of a trained model into the network, which may have more words and latent channels.

    Token embeddings are matched by the token's text. Raises ValueError if the model is not a text-to-image
    model.
    """
    (unet, old_encoder), encoder = networks_of(model), network.text_encoder
    assert isinstance(model.conditioner, TextConditioner)
    old, new = (each.prompt_tokenizer.tokenizer.get_vocab() for each in (old_encoder, encoder))
    text, shared = old_encoder.state_dict(), sorted(new.keys() & old.keys())
    rows = encoder.state_dict()
    key = next(key for key in text if key.endswith("token_embedding.weight"))
    rows[key][[new[token] for token in shared]] = text[key][[old[token] for token in shared]]
    encoder.load_state_dict(text | {key: rows[key]})
    copy_unet(unet, network.unet)
    if model.conditioner.layout:
        network.layout.load_state_dict(model.conditioner.layout.state_dict())


def copy_unet(old: UNet, new: UNet) -> None:
    """Copies weights into a UNet that may have more channels; the new ones start at zero."""
    weights, wide = old.state_dict(), new.state_dict()
    wide[UNET_INPUT].zero_()[:, input_channels(old.spec, new.spec)] = weights[UNET_INPUT]
    for key in UNET_OUTPUT:
        wide[key].zero_()[: len(weights[key])] = weights[key]
    new.load_state_dict(weights | {key: wide[key] for key in (UNET_INPUT, *UNET_OUTPUT)})


def input_channels(old: UNetSpec, new: UNetSpec) -> list[int]:
    """The channel of a new UNet's input for each of an old one's, which may lack the last inputs.

    Inputs are the latent, the mask, the masked image's latent and the layout.
    """
    few, many = old.out_channels, new.out_channels  # of the latent
    latent, masked = range(few), range(many + 1, many + 1 + few)
    return [*latent, many, *masked, *range(2 * many + 1, new.in_channels)][: old.in_channels]


def train(
    network: SceneNetwork,
    schedule: ScheduleSpec,
    data: dict[str, Tensor],
    scale: float,
    budget: Budget,
    state: Path,
    device: torch.device,
) -> bool:
    """Trains the network to predict v of the latents of draw_latents(); resumes from `state`.

    A part of the run, the spatial-relations phase, uses only scenes of two objects, at the noise levels where
    positions are decided. Training on the mix of all scenes does not teach which of two objects goes where:
    averaged over scenes and relations, its gradient towards that is zero. The phase teaches it in a few
    hundred updates if the model already knows the names, and in about two thousand if not; repeating such
    updates in the mix refines it. Returns True once the budget is spent.
    """
    trainer, table = Trainer(network, budget, state, device), Schedule(schedule).alpha_bar
    mixed_density = timestep_density(table).to(device, torch.float32)
    alpha_bar = torch.from_numpy(table).to(device, torch.float32)
    relations_density = (alpha_bar < RELATIONS_MAX_ALPHA_BAR).float()
    relations_density /= relations_density.sum()
    empty = network.text_encoder.tokenize([""]).to(device)
    two_objects = (data["counts"] == 2) & ~data["has_mask"]
    mix, relations = (
        batches(data, scale, empty, budget.batch, trainer.progress.updates, chosen)
        for chosen in (torch.ones_like(two_objects), two_objects)
    )
    begin, end = math.inf, math.inf
    if two_objects.any():
        begin, end = (60 * budget.minutes * part for part in RELATIONS_PHASE)

    def stream() -> Iterator[tuple[Batch, Tensor]]:
        while True:
            spent, updates = trainer.progress.seconds, trainer.progress.updates
            on_relations = spent >= begin and (spent < end or updates % RELATIONS_EVERY == 0)
            yield (next(relations), relations_density) if on_relations else (next(mix), mixed_density)

    def loss(drawn: tuple[Batch, Tensor]) -> Tensor:
        batch, density = drawn
        return v_error(
            lambda z_t, t: network(z_t, t, batch, data["names"]),
            batch.z,
            alpha_bar,
            density,
            mask_weights(batch),
        )

    return trainer.run(stream(), loss, "diffusion")

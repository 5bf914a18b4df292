"""Training of the latent diffusion model: L_LDM (equation 2), with the text encoder trained along."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.conditioning.conditioner import LayoutProjection
from models.conditioning.text_encoder import TextEncoder
from models.latent_diffusion import LatentDiffusion
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from models.sampling.schedule import Schedule
from models.spec import ScheduleSpec, TextSpec, UNetSpec
from models.training.first_stage import to_x
from models.training.scenes import GRAY, SIZE, Atlas, Scene, draw_scene, without_hidden
from models.training.trainer import Budget, Trainer

CHUNK = 64  # scenes encoded at once
SHORT, DROPPED = 0.1, 0.1  # shares of captions that leave the background out, and of empty ones
HOLED = 0.4  # share of scenes that are also encoded with a hole
SILENT = 0.8  # share of those that have no words, and nothing behind the hole of which nothing else is seen
SILENT_KINDS = {"one": 0.8, "related": 0.2}  # of their scenes
SILENT_HOLES = (0, 1, 1, 2, 2)  # kinds of theirs: most hide a part of an object
SEEN = 0.1  # weight of the error outside a hole, where the picture is known
KNOWN = 0.9  # how often a scene with words is learned with what is around its hole; without words always
EVEN = 0.3  # share of updates whose timestep is any, as likely
LESSON = (0.25, 0.45)  # part of a run in which only who stands where is learned, once names are known
REPEATED = 4  # from then on every so many updates are of the lesson
DECISIVE = 0.25  # alpha_bar below which that is decided
LAID_OUT = 0.15  # how often the regions of a scene are told, by turns as boxes and as silhouettes


class SceneNetwork(nn.Module):
    """The UNet with what conditions it: text, what is around a hole, and named regions."""

    def __init__(self, unet: UNetSpec, text: TextSpec, layout_channels: int, tokenizer) -> None:
        super().__init__()
        self.unet = UNet(unet)
        self.text_encoder = TextEncoder(text, tokenizer)
        self.layout = LayoutProjection(text.width, layout_channels)

    def forward(self, z_t: Tensor, t: Tensor, batch: Batch, names: Tensor) -> Tensor:
        """z_t (B, C, h, w), t (B,), names (K, L): ids of all names -> v (B, C, h, w)."""
        present, regions = batch.regions.unique(return_inverse=True)
        told = self.layout(self.text_encoder, names[(present.long() - 1).clamp(min=0)])
        table = told * (present > 0)[:, None]  # 0: no name
        layout = table[regions].movedim(-1, 1)  # (B, channels, h, w)
        x = torch.cat([z_t, batch.mask, batch.masked, layout.to(z_t.dtype)], dim=1)
        return self.unet(x, t, self.text_encoder(batch.ids).tokens)


class Batch(NamedTuple):
    """What an update learns from."""

    z: Tensor  # (B, C, h, w), scaled
    ids: Tensor  # (B, L), of the caption, or of the empty one
    mask: Tensor  # (B, 1, h, w), 1: to be painted
    masked: Tensor  # (B, C, h, w), scaled latent of the picture with gray where the mask is 1
    regions: Tensor  # (B, h, w), number of the name from 1, or 0


class Chunk(NamedTuple):
    """CHUNK scenes, the first HOLED of them with a hole."""

    pictures: np.ndarray  # uint8 (N, 128, 128, 3)
    hidden: np.ndarray  # uint8 (M, 128, 128, 3), with gray in the holes
    holes: np.ndarray  # bool (M, 128, 128)
    captions: tuple[str, ...]  # long and short of each scene in turn
    boxes: np.ndarray  # (N, h, w), numbers of names from 1, or 0
    regions: np.ndarray  # (N, h, w)
    counts: np.ndarray  # (N,), of objects


class Chunks(Dataset):
    """Drawn scenes; a chunk is the same whichever process draws it."""

    def __init__(self, names: Sequence[str], count: int, seed: int, factor: int) -> None:
        self.atlas, self.count, self.seed, self.factor = Atlas(names), count, seed, factor
        self.number = {name: index for index, name in enumerate(names, 1)}

    def __len__(self) -> int:
        return -(-self.count // CHUNK)

    def __getitem__(self, index: int) -> Chunk:
        rng = np.random.default_rng([self.seed, index])
        holed = round(HOLED * CHUNK)
        silent = round(SILENT * holed)
        scenes = [draw_scene(self.atlas, rng, kinds=SILENT_KINDS) for _ in range(silent)]
        scenes += [draw_scene(self.atlas, rng) for _ in range(CHUNK - silent)]
        holes = np.stack(
            [draw_hole(rng, scene, SILENT_HOLES) for scene in scenes[:silent]]
            + [draw_hole(rng, scene) for scene in scenes[silent:holed]]
        )
        for index in range(silent):
            scenes[index] = without_hidden(self.atlas, scenes[index], holes[index])
        known = np.stack([scene.picture for scene in scenes[:holed]])
        maps = [layouts(scene, self.number, self.factor) for scene in scenes]
        boxes, regions = (np.stack(part) for part in zip(*maps, strict=True))
        return Chunk(
            np.stack([scene.picture for scene in scenes]),
            np.where(holes[:, :, :, None], GRAY, known).astype(np.uint8),
            holes,
            tuple(text for scene in scenes for text in (scene.caption, scene.short_caption)),
            boxes,
            regions,
            np.array([len(scene.placed) for scene in scenes]),
        )


def draw_latents(
    autoencoder: Autoencoder, encoder: TextEncoder, names: Sequence[str], count: int, seed: int,
    device: torch.device, workers: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Draw scenes, in so many processes beside this one, and encode them once.

    latents, masked (N, C, h, w) unscaled bfloat16; ids (N, 2, L) of both captions; masks (N, 1, h, w), 1
    everywhere where `holed` (N,) is not; boxes and regions (N, h, w), numbers of names from 1, or 0; `counts`
    (N,) of objects.
    """
    factor = autoencoder.spec.factor
    parts: dict[str, list[Tensor]] = defaultdict(list)

    def encode(pictures: np.ndarray) -> Tensor:
        x = to_x(torch.from_numpy(pictures)).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            return autoencoder.encode(x).bfloat16()

    gray = encode(np.full((1, SIZE, SIZE, 3), GRAY, np.uint8))
    chunks = DataLoader(
        Chunks(names, count, seed, factor), batch_size=None, num_workers=workers, collate_fn=same
    )
    for chunk in tqdm(chunks, desc="latents", unit_scale=CHUNK, unit="scene"):
        holes = len(chunk.holes)
        masks = torch.ones(CHUNK, 1, SIZE // factor, SIZE // factor, dtype=torch.uint8)
        masks[:holes, 0] = max_pool2d(torch.from_numpy(chunk.holes).float(), factor).byte()
        parts["latents"].append(encode(chunk.pictures))
        parts["masked"].append(torch.cat([encode(chunk.hidden), gray.expand(CHUNK - holes, -1, -1, -1)]))
        parts["masks"].append(masks)
        parts["holed"].append(torch.arange(CHUNK) < holes)
        parts["ids"].append(encoder.tokenize(chunk.captions).view(CHUNK, 2, -1))
        parts["boxes"].append(torch.from_numpy(chunk.boxes))
        parts["regions"].append(torch.from_numpy(chunk.regions))
        parts["counts"].append(torch.from_numpy(chunk.counts))
    data = {key: torch.cat(values).to(device) for key, values in parts.items()}
    return data | {"gray": gray, "names": encoder.tokenize(names).to(device)}


def same(chunk: Chunk) -> Chunk:
    """What the loader makes of a chunk: nothing else."""
    return chunk


def draw_hole(rng: np.random.Generator, scene: Scene, kinds: Sequence[int] = (0, 1, 2)) -> np.ndarray:
    """What to paint anew, bool (128, 128). Kinds: 0 an object's surroundings, 1 a box, 2 a thick stroke."""
    kind, mask = kinds[rng.integers(len(kinds))], Image.new("1", (SIZE, SIZE))
    draw = ImageDraw.Draw(mask)
    if kind == 0:
        left, top, right, bottom = scene.boxes()[rng.integers(len(scene.names))]
        wide = rng.integers(0, 12, 4)
        draw.rectangle((left - wide[0], top - wide[1], right + wide[2], bottom + wide[3]), fill=1)
    elif kind == 1:
        width, height = rng.integers(24, 97, 2)
        left, top = rng.integers(0, SIZE - width + 1), rng.integers(0, SIZE - height + 1)
        draw.rectangle((left, top, left + width, top + height), fill=1)
    else:
        points = [tuple(map(int, point)) for point in rng.integers(0, SIZE, (rng.integers(2, 5), 2))]
        draw.line(points, fill=1, width=int(rng.integers(16, 41)), joint="curve")
    return np.asarray(mask)


def layouts(scene: Scene, number: Mapping[str, int], factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and silhouettes of a scene at the latent's size, (h, w) int16: numbers of names, or 0."""
    numbers = np.array([0, *(number[name] for name in scene.names)], np.int16)
    boxes = np.zeros((SIZE, SIZE), np.int16)
    for index, (left, top, right, bottom) in enumerate(scene.boxes(), 1):
        boxes[top:bottom, left:right] = numbers[index]
    middle = slice(factor // 2, None, factor)
    return boxes[middle, middle], numbers[scene.regions[middle, middle]]


def batches(
    data: dict[str, Tensor], scale: float, empty: Tensor, size: int, seed: int, chosen: Tensor
) -> Iterator[Batch]:
    """Endless random batches: captions shortened or dropped, holes and layouts told at random.

    chosen (N,): true for the scenes to learn from.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen, device = chosen.nonzero()[:, 0], empty.device
    gray = data["gray"].float() * scale

    def chance(part: float, size: int) -> Tensor:
        return (torch.rand(size, generator=generator) < part).to(device)

    while True:
        for part in torch.randperm(len(chosen), generator=generator).to(device).split(size):
            index, n = chosen[part], len(part)
            # A scene without words lacks what its hole hides: without the hole it would teach empty pictures.
            silent = (data["ids"][index, 0] == empty).all(1)
            known = data["holed"][index] & (chance(KNOWN, n) | silent)
            laid_out, boxed = chance(LAID_OUT, n), chance(0.5, n)
            nothing = chance(DROPPED, n)
            ids = data["ids"][index, chance(SHORT, n).long()]
            regions = torch.where(boxed[:, None, None], data["boxes"][index], data["regions"][index])
            tell = (laid_out & ~nothing)[:, None, None]
            here = known[:, None, None, None]
            yield Batch(
                data["latents"][index].float() * scale,
                torch.where(nothing[:, None], empty, ids),
                torch.where(here, data["masks"][index].float(), 1.0),
                torch.where(here, data["masked"][index].float() * scale, gray),
                torch.where(tell, regions, 0),
            )


def in_holes(batch: Batch) -> Tensor:
    """Weight of each cell's error, (B, 1, h, w), of mean 1 in each picture: most is in its hole."""
    weight = batch.mask.clamp(min=SEEN)
    return weight / weight.mean((2, 3), keepdim=True)


def timestep_density(alpha_bar: np.ndarray) -> Tensor:
    """How often training draws each timestep: (T,), sums to 1.

    The logit-normal density of Esser et al. 2024 (section 3.1) over the angle that the signal's and the
    noise's parts make: shapes are decided at middle noise, so most updates go there. A share is spread over
    all timesteps: which of two objects stands where is decided while there is hardly anything but noise.
    """
    angle = np.arccos(np.sqrt(alpha_bar)) / (np.pi / 2)  # 0: no noise, 1: noise only
    logit = np.log(angle / (1 - angle))
    density = np.exp(-0.5 * logit**2) / (angle * (1 - angle)) * np.gradient(angle)
    density = (1 - EVEN) * density / density.sum() + EVEN / len(density)
    return torch.from_numpy(density)


def v_error(
    predict: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    alpha_bar: Tensor,
    density: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Error of the predicted v (Salimans and Ho 2022) at random timesteps.

    predict: z_t (B, C, h, w), t (B,) -> v; alpha_bar, density (T,). weight: of each cell, (B, 1, h, w) with
    mean 1; None: the same for all.
    """
    quantiles = (torch.arange(len(z)) + torch.rand(len(z))).to(z.device) / len(z)  # one of each share
    t = torch.searchsorted(density.cumsum(0), quantiles).clamp(max=len(density) - 1)
    ab = alpha_bar[t][:, None, None, None]
    eps = torch.randn_like(z)
    v = ab.sqrt() * eps - (1 - ab).sqrt() * z
    error = (predict(ab.sqrt() * z + (1 - ab).sqrt() * eps, t).float() - v).square()
    return (error if weight is None else weight * error).mean()


def start_from(network: SceneNetwork, bundle: LatentDiffusion) -> None:
    """Take over what a smaller or older model has learned.

    Tokens are matched by their text; of a layer that has grown, what is new starts at zero.
    """
    old, new = (
        bundle.conditioner.encoders[0].tokenizer.get_vocab(),
        network.text_encoder.tokenizer.get_vocab(),
    )
    text, shared = bundle.conditioner.encoders[0].state_dict(), sorted(new.keys() & old.keys())
    rows = network.text_encoder.state_dict()
    key = next(key for key in text if key.endswith("token_embedding.weight"))
    rows[key][[new[token] for token in shared]] = text[key][[old[token] for token in shared]]
    network.text_encoder.load_state_dict(text | {key: rows[key]})
    unet, key = bundle.unet.state_dict(), "input_blocks.0.0.weight"
    grown = torch.zeros_like(network.unet.state_dict()[key])
    grown[:, : unet[key].shape[1]] = unet[key]
    network.unet.load_state_dict(unet | {key: grown})
    if bundle.conditioner.layout:
        network.layout.load_state_dict(bundle.conditioner.layout.state_dict())


def train(
    network: SceneNetwork, schedule: ScheduleSpec, data: dict[str, Tensor], scale: float,
    budget: Budget, state: Path, device: torch.device,
) -> bool:  # fmt: skip
    """Train the network to predict v on cached latents; resumes from `state`. Whether the budget is spent.

    A part of the run is a lesson: scenes of two objects alone, in the noise where their places are decided.
    The mean over all scenes and relations tells nothing of who stands where, and the mix of all scenes does
    not leave that plateau. The lesson does, in some hundred updates where names are known and two thousand
    where they hardly are. Repeated in the mix, it is learned further.
    """
    trainer, alpha_bar = Trainer(network, budget, state, device), Schedule(schedule).alpha_bar
    always = timestep_density(alpha_bar).to(device, torch.float32)
    alpha_bar = torch.from_numpy(alpha_bar).to(device, torch.float32)
    decisive = (alpha_bar < DECISIVE).float()
    decisive /= decisive.sum()
    empty = network.text_encoder.tokenize([""]).to(device)
    two = (data["counts"] == 2) & ~data["holed"]
    mix, lesson = (
        batches(data, scale, empty, budget.batch, trainer.progress.updates, chosen)
        for chosen in (torch.ones_like(two), two)
    )
    begin, end = (60 * budget.minutes * part for part in LESSON) if two.any() else (math.inf, math.inf)

    def stream() -> Iterator[tuple[Batch, Tensor]]:
        while True:
            spent, updates = trainer.progress.seconds, trainer.progress.updates
            in_lesson = spent >= begin and (spent < end or updates % REPEATED == 0)
            yield (next(lesson), decisive) if in_lesson else (next(mix), always)

    def loss(drawn: tuple[Batch, Tensor]) -> Tensor:
        batch, density = drawn
        return v_error(
            lambda z_t, t: network(z_t, t, batch, data["names"]), batch.z, alpha_bar, density, in_holes(batch)
        )

    return trainer.run(stream(), loss, "diffusion")

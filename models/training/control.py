"""Training of a ControlNet for the text-to-image model: the control image is the outline of the objects.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models". The network copies the
UNet's input blocks and middle block without their attention, as the small ControlNets of SDXL do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d
from tqdm import tqdm

from models.adapter_specs import ControlNetSpec
from models.dtypes import mixed_precision
from models.latent_diffusion import LatentDiffusion
from models.networks.adapter_inputs import AdapterInputs
from models.networks.control_net import ControlNet
from models.networks.unet import UNet
from models.sampling.schedule import Schedule
from models.spec import UNetSpec
from models.training.diffusion import CHUNK, networks_of, timestep_density, v_error
from models.training.first_stage import to_x
from models.training.scenes import Atlas, draw_scene
from models.training.trainer import Budget, Trainer

SIZES = (40, 121)  # of single objects, in pixels
KINDS = {"one": 0.6, "related": 0.15, "tilted": 0.1, "upside down": 0.1, "counted": 0.05}  # of scenes
SHORT_SHARE = 0.3  # of captions: without the background
EMPTY_SHARE = 0.2  # of captions: replaced by an empty one
FILLED_SHARE = 0.25  # of control images: silhouettes instead of outlines
WIDTHS = (1, 3)  # pixels that an outline reaches beyond and into the object, from thin to thick
SHAPE_SHARE = 0.5  # of updates: at noise levels where shapes are decided
SHAPE_MAX_ALPHA_BAR = 0.25  # alpha_bar of those noise levels
HINT_WIDTHS = (16, 32, 64, 96)


def control_spec(unet: UNetSpec, latent_channels: int) -> ControlNetSpec:
    """The shape of a ControlNet without attention for a UNet."""
    plain = replace(
        unet,
        in_channels=latent_channels,
        transformer_depth=(0,) * len(unet.channels),
        middle_depth=0,
        middle_res_blocks=1,
    )
    return ControlNetSpec(plain, hint_widths=HINT_WIDTHS)


class ControlledUNet(nn.Module):
    """A UNet whose every call gets the residuals of a ControlNet; takes the UNet's place in a model.

    hint: (B, C, h, w), of the images of a call; a call of 2B rows has both rows of every pair, B by B.
    """

    def __init__(self, unet: UNet, control: ControlNet, hint: Tensor) -> None:
        super().__init__()
        self.unet, self.control, self.hint, self.dtype = unet, control, hint, unet.dtype

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, *others: object) -> Tensor:
        """As UNet.forward(), without other inputs."""
        assert not any(other is not None for other in others)
        z = x[:, : self.control.spec.unet.in_channels]
        hint = self.hint.repeat(len(x) // len(self.hint), 1, 1, 1)
        made = self.control(z, t, context, None, hint)
        out: Tensor = self.unet(x, t, context, adapters=AdapterInputs(made.skips, made.middle))
        return out


def start_from(control: ControlNet, unet: UNet, constant: Tensor) -> None:
    """Copies the UNet's encoder; residuals start at zero.

    constant: (1, C', h, w), the concat channels of all training data, which the ControlNet does not get: the
    mean of what they add is added to the first convolution's bias.
    """
    theirs, ours = unet.state_dict(), control.state_dict()
    copied = {key: theirs[key] for key in ours.keys() & theirs.keys() if ours[key].shape == theirs[key].shape}
    first, channels = theirs["input_blocks.0.0.weight"], control.spec.unet.in_channels
    added = conv2d(constant.to(first), first[:, channels:], padding=1).mean((0, 2, 3))
    copied["input_blocks.0.0.weight"] = first[:, :channels]
    copied["input_blocks.0.0.bias"] = theirs["input_blocks.0.0.bias"] + added
    control.load_state_dict(ours | copied)
    for module in (*control.zero_convs, control.middle_block_out):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


def draw_data(
    model: LatentDiffusion, names: Sequence[str], count: int, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Draws N scenes and encodes them: name -> tensor, on the device.

    latents: (N, C, h, w), scaled bfloat16; masks: (N, 128, 128), bool, the objects; ids: (N, 2, L), token ids
    of both captions.
    """
    rng, atlas, (_, encoder) = np.random.default_rng(seed), Atlas(names), networks_of(model)
    latents, masks, ids = [], [], []
    for _ in tqdm(range(-(-count // CHUNK)), desc="scenes", unit_scale=CHUNK, unit="scene"):
        scenes = [draw_scene(atlas, rng, SIZES, KINDS) for _ in range(CHUNK)]
        x = to_x(torch.from_numpy(np.stack([scene.image for scene in scenes]))).to(device)
        with torch.no_grad(), mixed_precision(device):
            latents.append(model.encode(x).bfloat16())
        masks.append(torch.from_numpy(np.stack([scene.regions > 0 for scene in scenes])))
        texts = [text for scene in scenes for text in (scene.caption, scene.short_caption)]
        ids.append(encoder.tokenize(texts).view(CHUNK, 2, -1))
    data = {"latents": latents, "masks": masks, "ids": ids}
    return {key: torch.cat(parts).to(device) for key, parts in data.items()}


def outlines(masks: Tensor, width: int = 1) -> Tensor:
    """White outlines on black: (B, H, W) bool -> (B, 3, H, W) in [0, 1].

    width: pixels beyond and into the object.
    """
    inside = masks[:, None].float()
    grown, shrunk = (max_pool2d(x, 2 * width + 1, 1, width) for x in (inside, -inside))
    return (grown + shrunk).expand(-1, 3, -1, -1)


def control_images(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Random outlines and silhouettes of a batch: (B, H, W) bool -> (B, 3, H, W) in [0, 1]."""
    filled = (torch.rand(len(masks), generator=generator) < FILLED_SHARE).to(masks.device)
    width = int(torch.randint(WIDTHS[0], WIDTHS[1] + 1, (), generator=generator))
    silhouettes = masks[:, None].float().expand(-1, 3, -1, -1)
    return torch.where(filled[:, None, None, None], silhouettes, outlines(masks, width))


class Batch(NamedTuple):
    """The data of one update."""

    z: Tensor  # (B, C, h, w), scaled
    ids: Tensor  # (B, L), token ids of the caption, which may be empty
    images: Tensor  # (B, 3, H, W) in [0, 1], control images


def batches(data: dict[str, Tensor], empty: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Endless random batches. data: from draw_data(); empty: (1, L), token ids of the empty caption."""
    generator, device = torch.Generator().manual_seed(seed), empty.device

    def chance(share: float) -> Tensor:
        return (torch.rand(size, generator=generator) < share).to(device)

    while True:
        index = torch.randint(len(data["latents"]), (size,), generator=generator).to(device)
        ids = data["ids"][index, chance(SHORT_SHARE).long()]
        yield Batch(
            data["latents"][index].float(),
            torch.where(chance(EMPTY_SHARE)[:, None], empty, ids),
            control_images(data["masks"][index], generator),
        )


def train(
    model: LatentDiffusion, data: dict[str, Tensor], budget: Budget, state: Path, device: torch.device
) -> bool:
    """Trains a ControlNet for the model, whose weights are frozen; resumes from `state`.

    data: from draw_data(). Returns True once the budget is spent.
    """
    (unet, encoder), (_, channels, h, w) = networks_of(model), data["latents"].shape
    concat = model.concat_channels(h, w)
    constant = torch.zeros(1, 0, h, w) if concat is None else concat[:1].clone()
    control = ControlNet(control_spec(unet.spec, channels))
    start_from(control, unet, constant)
    trainer = Trainer(control, budget, state, device)
    table = Schedule(model.spec.schedule).alpha_bar
    alpha_bar = torch.from_numpy(table).to(device, torch.float32)
    shape = (alpha_bar < SHAPE_MAX_ALPHA_BAR).float()
    mixed = timestep_density(table).to(device, torch.float32)
    density = (1 - SHAPE_SHARE) * mixed + SHAPE_SHARE * shape / shape.sum()

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            context = encoder(batch.ids).tokens
        network = ControlledUNet(unet, control, control.embed_hint(batch.images))
        rest = constant.expand(len(batch.z), -1, -1, -1)
        return v_error(
            lambda z_t, t: network(torch.cat([z_t, rest], dim=1), t, context), batch.z, alpha_bar, density
        )

    empty = encoder.tokenize([""]).to(device)
    return trainer.run(batches(data, empty, budget.batch, trainer.progress.updates), loss, "control")

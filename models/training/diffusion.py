"""Training of the latent diffusion model: L_LDM (equation 2), with the text encoder trained along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.autoencoder import Autoencoder
from models.schedule import Schedule
from models.spec import ScheduleSpec, TextSpec, UNetSpec
from models.text_encoder import TextEncoder
from models.training.first_stage import to_x
from models.training.scenes import Atlas, draw_scene
from models.training.trainer import Budget, Trainer
from models.unet import UNet

CHUNK = 64  # scenes encoded at once
SHORT, DROPPED = 0.1, 0.1  # shares of captions that leave the background out, and of empty ones


class TextConditionedUNet(nn.Module):
    """The UNet and the text encoder that is trained with it."""

    def __init__(self, unet: UNetSpec, text: TextSpec, tokenizer) -> None:
        super().__init__()
        self.unet = UNet(unet)
        self.text_encoder = TextEncoder(text, tokenizer)

    def forward(self, z_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(z_t, t, self.text_encoder(ids))


def draw_latents(
    autoencoder: Autoencoder,
    encoder: TextEncoder,
    names: Sequence[str],
    count: int,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Draw scenes and encode them once: unscaled latents in bfloat16, and the ids of both captions."""
    atlas, rng = Atlas(names), np.random.default_rng(seed)
    latents, ids = [], []
    for _ in tqdm(range(0, count, CHUNK), desc="latents", unit_scale=CHUNK, unit="scene"):
        scenes = [draw_scene(atlas, rng) for _ in range(CHUNK)]
        x = to_x(torch.from_numpy(np.stack([scene.picture for scene in scenes]))).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latents.append(autoencoder.encode(x).bfloat16())
        captions = [text for scene in scenes for text in (scene.caption, scene.short_caption)]
        ids.append(encoder.tokenize(captions).view(CHUNK, 2, -1))
    return {"latents": torch.cat(latents), "ids": torch.cat(ids).to(device)}


def batches(data: dict[str, Tensor], scale: float, empty: Tensor, size: int, seed: int) -> Iterator[tuple]:
    """Endless random batches of (scaled latents, ids), captions shortened or dropped at random."""
    generator = torch.Generator().manual_seed(seed)
    count = len(data["latents"])
    while True:
        for index in torch.randperm(count, generator=generator).split(size):
            draw = torch.rand(len(index), generator=generator)
            index, draw = index.to(empty.device), draw.to(empty.device)
            ids = data["ids"][index, (draw < SHORT).long()]
            ids = torch.where((draw > 1 - DROPPED)[:, None], empty, ids)
            yield data["latents"][index].float() * scale, ids


def timestep_density(alpha_bar: np.ndarray) -> Tensor:
    """How often training draws each timestep: (T,), sums to 1.

    The logit-normal density of Esser et al. 2024 (section 3.1) over the angle that the signal's and the
    noise's parts make: shapes are decided at middle noise, so most updates go there.
    """
    angle = np.arccos(np.sqrt(alpha_bar)) / (np.pi / 2)  # 0: no noise, 1: noise only
    logit = np.log(angle / (1 - angle))
    density = np.exp(-0.5 * logit**2) / (angle * (1 - angle)) * np.gradient(angle)
    return torch.from_numpy(density / density.sum())


def loss(network: TextConditionedUNet, alpha_bar: Tensor, density: Tensor, z: Tensor, ids: Tensor) -> Tensor:
    """Error of the predicted v (Salimans and Ho 2022) at random timesteps.

    alpha_bar, density (T,); z (B, C, h, w), scaled latents; ids (B, L).
    """
    t = torch.multinomial(density, len(z), replacement=True)
    ab = alpha_bar[t][:, None, None, None]
    eps = torch.randn_like(z)
    v = ab.sqrt() * eps - (1 - ab).sqrt() * z
    out = network(ab.sqrt() * z + (1 - ab).sqrt() * eps, t, ids).float()
    return (out - v).square().mean()


def train(
    network: TextConditionedUNet, schedule: ScheduleSpec, data: dict[str, Tensor], scale: float,
    budget: Budget, state: Path, device: torch.device,
) -> None:  # fmt: skip
    """Train the UNet and the text encoder to predict v on cached latents; resumes from `state`."""
    trainer, alpha_bar = Trainer(network, budget, state, device), Schedule(schedule).alpha_bar
    density = timestep_density(alpha_bar).to(device, torch.float32)
    alpha_bar = torch.from_numpy(alpha_bar).to(device, torch.float32)
    empty = network.text_encoder.tokenize([""]).to(device)
    stream = batches(data, scale, empty, budget.batch, seed=trainer.progress.updates)
    trainer.run(stream, lambda batch: loss(network, alpha_bar, density, *batch), "diffusion")

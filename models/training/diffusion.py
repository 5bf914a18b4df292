"""Training of the latent diffusion model: L_LDM (equation 2), with the text encoder trained along."""

from __future__ import annotations

from collections.abc import Iterator
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

SNR_CAP = 5.0  # min-SNR weighting (Hang et al. 2023)
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
    autoencoder: Autoencoder, encoder: TextEncoder, names: list[str], count: int, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """Draw scenes and encode them once: unscaled latents in bfloat16, and the ids of both captions."""
    atlas, rng = Atlas(names), np.random.default_rng(seed)
    latents, ids = [], []
    for _ in tqdm(range(0, count, 64), desc="latents", unit_scale=64, unit="scene"):
        scenes = [draw_scene(atlas, rng) for _ in range(64)]
        x = to_x(torch.from_numpy(np.stack([scene.picture for scene in scenes]))).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latents.append(autoencoder.encode(x).bfloat16())
        captions = [text for scene in scenes for text in (scene.caption, scene.short_caption)]
        ids.append(encoder.tokenize(captions).view(64, 2, -1))
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


def loss(network: TextConditionedUNet, schedule: Schedule, z: Tensor, ids: Tensor) -> Tensor:
    """Weighted error of the predicted v (Salimans and Ho 2022) or eps at random timesteps."""
    alpha_bar = torch.as_tensor(schedule.alpha_bar, dtype=torch.float32, device=z.device)
    t = torch.randint(len(alpha_bar), (len(z),), device=z.device)
    ab = alpha_bar[t][:, None, None, None]
    eps = torch.randn_like(z)
    v_wanted = schedule.spec.prediction == "v_prediction"
    target = ab.sqrt() * eps - (1 - ab).sqrt() * z if v_wanted else eps
    out = network(ab.sqrt() * z + (1 - ab).sqrt() * eps, t, ids).float()
    snr = (ab / (1 - ab)).flatten()
    weight = snr.clamp(max=SNR_CAP) / (snr + 1 if v_wanted else snr)
    return (weight * (out - target).square().mean(dim=(1, 2, 3))).mean()


def train(
    network: TextConditionedUNet, schedule: ScheduleSpec, data: dict[str, Tensor], scale: float,
    budget: Budget, state: Path, device: torch.device,
) -> None:  # fmt: skip
    """Train the UNet and the text encoder on cached latents; resumes from `state`."""
    trainer, table = Trainer(network, budget, state, device), Schedule(schedule)
    empty = network.text_encoder.tokenize([""]).to(device)
    stream = batches(data, scale, empty, budget.batch, seed=trainer.progress.updates)
    trainer.run(stream, lambda batch: loss(network, table, *batch), "diffusion")

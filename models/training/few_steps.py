"""Distillation of a text-to-image model into a LoRA that needs few steps and no guidance.

Progressive distillation in one stage (Salimans and Ho 2022; with guidance, Meng et al. 2023): the guided
model denoises from noise in many DDIM steps, and its path is cut into phases, one for each step that
the LoRA will need. The model with the LoRA learns to cross each phase in one step, without guidance. No
images are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from models.dtypes import mixed_precision
from models.formats import keymaps
from models.latent_diffusion import LatentDiffusion
from models.networks.unet import UNet
from models.sampling.schedule import Schedule
from models.training.diffusion import networks_of
from models.training.scenes import COLOURS, held_out, place_objects
from models.training.trainer import Budget, Trainer

STEPS = 4  # that the LoRA is trained for
TEACHER_STEPS = 4  # of the guided model in each phase
RANK = 10
KINDS = {"one": 0.6, "related": 0.25, "three": 0.05, "counted": 0.05, "small": 0.05}  # of captions
SHORT_SHARE = 0.1  # of captions: without the background
CHUNK = 32  # images that the guided model draws at once
LORA_FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks for it


class LowRank(nn.Module):
    """Low-rank changes of all linear layers and convolutions of a UNet (Hu et al. 2021), zero at first."""

    def __init__(self, unet: UNet, rank: int = RANK) -> None:
        super().__init__()
        layers = [(name, layer) for name, layer in unet.named_modules() if is_layer(layer)]
        self.names = [name for name, _ in layers]
        weights = [layer.get_parameter("weight") for _, layer in layers]
        self.down = nn.ParameterList(
            torch.randn(rank, *w.shape[1:]) / math.sqrt(w[0].numel()) for w in weights
        )
        self.up = nn.ParameterList(torch.zeros(len(w), rank) for w in weights)

    def merged(self, unet: UNet) -> dict[str, Tensor]:
        """The UNet's changed weights, by name."""
        return {
            f"{name}.weight": unet.get_parameter(f"{name}.weight")
            + (up @ down.flatten(1)).view(-1, *down.shape[1:])
            for name, down, up in zip(self.names, self.down, self.up, strict=True)
        }

    def tensors(self, unet: UNet) -> dict[str, Tensor]:
        """The tensors of a LoRA file, by the names of diffusers."""
        table, found = keymaps.unet(unet.spec), {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            module = f"unet.{keymaps.rename(name, table)}"
            found[f"{module}.lora_A.weight"] = down
            found[f"{module}.lora_B.weight"] = up.view(*up.shape, *[1] * (down.ndim - 2))
        return found


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def save(low_rank: LowRank, unet: UNet, folder: Path) -> None:
    """Writes a LoRA in float16; its title, the folder's name, tells models.formats.few_step its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().half().contiguous() for key, value in low_rank.tensors(unet).items()}
    save_file(tensors, folder / LORA_FILE, {"format": "pt", "modelspec.title": folder.resolve().name})


class Angles:
    """A schedule by the angle between signal and noise, of which 0 is no noise."""

    def __init__(self, schedule: Schedule) -> None:
        """Raises ValueError if the model does not predict v, or its last step does not end without noise."""
        if schedule.spec.prediction != "v_prediction" or not schedule.spec.final_alpha_one:
            raise ValueError(
                "distillation is for models that predict v and whose last step ends without noise"
            )
        self.schedule = schedule
        self.table = np.arccos(np.sqrt(np.concatenate([schedule.alpha_bar, [1.0]])))  # [-1]: no noise

    def path(self, steps: int, parts: int) -> list[int]:
        """Timesteps of `steps` trailing DDIM steps, each cut into `parts`; the last one is -1, no noise."""
        return [*self.schedule.timesteps(steps * parts, "trailing").tolist(), -1]

    def step(self, x: Tensor, v: Tensor, t: int, to: int) -> Tensor:
        """A DDIM step by v (Salimans and Ho 2022, appendix D): a rotation of x."""
        turn = float(self.table[t] - self.table[to])
        return math.cos(turn) * x - math.sin(turn) * v

    def v_between(self, x: Tensor, end: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """The v whose step leads from x to `end`; t, to: (B,)."""
        table = torch.from_numpy(self.table).to(x)
        turn = (table[t] - table[to])[:, None, None, None]
        return (turn.cos() * x - end) / turn.sin()


def captions(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Random captions of the training data, without held-out pairs."""
    rng = np.random.default_rng(seed)
    made: list[str] = []
    while len(made) < count:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        chosen = [names[i] for i in rng.integers(len(names), size=3)]
        placed, words = place_objects(rng, chosen, kind, (72, 121))
        if not any(held_out(each.name, colour) for each in placed):
            made.append(words if rng.random() < SHORT_SHARE else f"{words} on a {colour} background")
    return made


@torch.no_grad()
def draw_paths(
    model: LatentDiffusion, names: Sequence[str], count: int, guidance_scale: float, seed: int
) -> dict[str, Tensor]:
    """The guided model's paths from noise, of N captions: name -> tensor.

    states: (N, STEPS + 1, C, h, w) float16, where each phase begins, and the last one's end; ids: (N, L).
    """
    (_, encoder), defaults = networks_of(model), model.spec.defaults
    shape = model.spec.latent_shape(defaults.width, defaults.height)
    angles, generator = Angles(model.schedule), torch.Generator().manual_seed(seed)
    path, texts = angles.path(STEPS, TEACHER_STEPS), captions(names, count, seed)
    ids, states = encoder.tokenize(texts), []
    concat = model.concat_channels(*shape[1:])
    for part in tqdm(ids.split(CHUNK), desc="paths", unit_scale=CHUNK, unit="path"):
        context = encoder(torch.cat([encoder.tokenize([""] * len(part)), part]).to(model.device)).tokens
        x = torch.randn(len(part), *shape, generator=generator).to(model.device)
        seen = [x]
        for number, (t, to) in enumerate(pairwise(path), 1):
            v = guided_v(model, x, t, context, concat, guidance_scale)
            x = angles.step(x, v, t, to)
            if number % TEACHER_STEPS == 0:
                seen.append(x)
        states.append(torch.stack(seen, 1).half().cpu())
    return {"states": torch.cat(states), "ids": ids}


def guided_v(
    model: LatentDiffusion, x: Tensor, t: int, context: Tensor, concat: Tensor | None, scale: float
) -> Tensor:
    """v with guidance: x (B, C, h, w), context (2B, L, C_ctx), unconditional rows first."""
    assert model.unet is not None
    both = with_concat(torch.cat([x, x]), concat)
    with mixed_precision(x.device):
        v = model.unet(both, torch.full((len(both),), t, device=x.device), context)
    unconditional, conditional = v.float().chunk(2)
    guided: Tensor = unconditional + scale * (conditional - unconditional)
    return guided


def with_concat(x: Tensor, concat: Tensor | None) -> Tensor:
    """x with the concat channels of text-to-image: concat (1 or more, C', h, w)."""
    return x if concat is None else torch.cat([x, concat[:1].expand(len(x), -1, -1, -1)], dim=1)


class Batch(NamedTuple):
    """The data of one update."""

    x: Tensor  # (B, C, h, w), where a phase begins
    end: Tensor  # (B, C, h, w), where it ends
    phase: Tensor  # (B,)
    ids: Tensor  # (B, L), token ids of the caption


def batches(data: dict[str, Tensor], size: int, seed: int) -> Iterator[Batch]:
    """Endless random batches of phases. data: from draw_paths()."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = torch.randint(len(data["ids"]), (size,), generator=generator)
        phase = torch.randint(STEPS, (size,), generator=generator)
        states = data["states"]
        yield Batch(states[index, phase].float(), states[index, phase + 1].float(), phase, data["ids"][index])


def train(
    model: LatentDiffusion, data: dict[str, Tensor], budget: Budget, state: Path, device: torch.device
) -> bool:
    """Trains the LoRA of a model, whose weights are frozen; resumes from `state`.

    data: from draw_paths(). Returns True once the budget is spent.
    """
    angles, (unet, encoder) = Angles(model.schedule), networks_of(model)
    path = torch.tensor(angles.path(STEPS, 1), device=device)
    concat = model.concat_channels(*data["states"].shape[-2:])
    low_rank = LowRank(unet)
    trainer = Trainer(low_rank, budget, state, device)

    def loss(batch: Batch) -> Tensor:
        x, end, phase, ids = (part.to(device) for part in batch)
        with torch.no_grad():
            context = encoder(ids).tokens
        t, to = path[phase], path[phase + 1]
        v = functional_call(unet, low_rank.merged(unet), (with_concat(x, concat), t, context))
        error: Tensor = (v.float() - angles.v_between(x, end, t, to)).square().mean()
        return error

    return trainer.run(batches(data, budget.batch, trainer.progress.updates), loss, "few steps")

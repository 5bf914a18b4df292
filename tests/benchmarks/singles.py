"""Stable Diffusion's single files at their full published shapes against `diffusers` and `transformers`.

    python -m tests.benchmarks.singles [ROW ...] [--folder DIR] [--cells N] [--narrow]

Weights are random float32. To save memory, the networks of a file are created, run and written to it one at a
time; our model reads its weights from the file. Errors are |a - b| / |b|; the error of the context is the
larger of token vectors and pooled text.
"""

from __future__ import annotations

import gc
import mmap
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from models.checkpoint import load, tokenizers
from models.formats.safetensors import read_safetensors
from tests.benchmarks.family import LIMIT, compare, error
from tests.checkpoints import sd_files
from tests.checkpoints.sd_files import TOKENS, Reference, Row
from tests.checkpoints.tiny import fill_randomly

PROMPTS = ["red apple", "a sunset behind a mountain range"]
SIZE = (64, 96)  # width and height that SDXL is conditioned on, as in Row.numbers
NOISE_LEVELS = (20, 350)


def main() -> None:
    compare(__doc__, sd_files.ROWS, measure)


def measure(name: str, folder: Path, cells: int, narrow: bool) -> tuple[tuple, bool]:
    """A line of the table, and whether all its errors are within the limit."""
    row = sd_files.narrow(sd_files.ROWS[name]) if narrow else sd_files.ROWS[name]
    tensors = sd_files.published(name, row, sd_files.outline(row))
    file = sd_files.hollow(folder / f"{name}.safetensors", tensors)
    fill(file, {key: value for key, value in tensors.items() if value.device.type != "meta"})
    theirs = reference_outputs(row, file, cells)
    begin = time.monotonic()
    model = load(file)
    seconds = f"{time.monotonic() - begin:.1f}"
    outputs = model.conditioner.encode(ids_of(row))
    x, t, context, pooled, levels = unet_inputs(row, cells)
    if pooled is not None:
        pooled = torch.cat([pooled, model.size_embedding(*SIZE).expand(2, -1)], dim=-1)
    ours = {
        "eps": model.unet(x, t, context, pooled, levels),
        "D": model.autoencoder.decode(latents(cells)),
        "E": model.autoencoder.encode(images(row, cells)),
        "context": outputs.tokens,
        "pooled": outputs.pooled,
    }
    errors = {what: error(ours[what], there) for what, there in theirs.items()}
    errors["context"] = max(errors["context"], errors.pop("pooled", 0.0))
    parts = (model.unet, model.autoencoder, model.conditioner)
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    columns = [errors[what] for what in ("eps", "D", "E", "context")]
    return (name, len(tensors), count, *columns, seconds, "diffusers"), max(columns) <= LIMIT


def reference_outputs(row: Row, file: Path, cells: int) -> dict[str, Tensor]:
    """Creates the reference networks one after the other: writes each to the file and returns its outputs."""
    out, texts = {}, []
    for index, text in enumerate(row.texts):
        network = filled(sd_files.bare(lambda text=text: sd_files.make_text(text)), 3 + index)
        fill(file, prefixed(text.prefix, sd_files.text_tensors(text, network)))
        texts.append(network)
    held = Reference(None, None, tuple(texts))
    out["context"], pooled = held.context(row, ids_of(row))
    if row.size_width:
        out["pooled"] = pooled
    del held, texts, network
    gc.collect()

    stage = filled(sd_files.bare(lambda: sd_files.make_autoencoder(row)), 2)
    fill(file, prefixed("first_stage_model.", sd_files.stage_tensors(row, stage)))
    out["D"] = stage.decode(latents(cells)).sample
    out["E"] = stage.encode(images(row, cells)).latent_dist.mode()
    del stage
    gc.collect()

    unet = filled(sd_files.bare(lambda: sd_files.make_unet(row)), 1)
    fill(file, prefixed("model.diffusion_model.", sd_files.unet_tensors(row, unet)))
    x, t, context, pooled, levels = unet_inputs(row, cells)
    options = {"class_labels": levels}
    if pooled is not None:
        options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.tensor([row.numbers] * 2)}
    out["eps"] = unet(x, t, context, **options).sample
    return out


def filled(network: nn.Module, seed: int) -> nn.Module:
    """Gives a network on the meta device random weights, and the right position ids."""
    network = network.to_empty(device="cpu")
    if isinstance(network, CLIPTextModel | CLIPTextModelWithProjection):
        for key, buffer in network.named_buffers():
            assert key.endswith("position_ids")
            buffer.copy_(torch.arange(TOKENS)[None])
    fill_randomly(network, seed)
    return network.requires_grad_(False).eval()


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def fill(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Overwrites tensors in a safetensors file that already has tensors of these names and shapes."""
    stored = read_safetensors(file).tensors
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as data:
        for key, value in tensors.items():
            entry = stored[key]
            end = entry.start + entry.extent
            data[entry.start : end] = value.detach().float().contiguous().numpy().tobytes()


def unet_inputs(row: Row, cells: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """x (not square), t, context, and the pooled text and noise levels that this UNet takes."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, row.in_channels, cells, 2 * cells, generator=generator)
    context = torch.randn(2, 5, sum(text.width for text in row.texts), generator=generator)
    pooled = torch.randn(2, row.texts[-1].width, generator=generator) if row.size_width else None
    levels = torch.tensor(NOISE_LEVELS) if row.noise_levels else None
    return x, torch.tensor([1, 801]), context, pooled, levels


def latents(cells: int) -> Tensor:
    return torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(8))


def images(row: Row, cells: int) -> Tensor:
    side = row.factor * cells
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(9)) * 2 - 1


def ids_of(row: Row) -> list[Tensor]:
    """Token ids of PROMPTS for each text encoder."""
    tables = [tokenizers.clip(sd_files.PAD if text.open_clip else None) for text in row.texts]
    return [table(PROMPTS, padding="max_length", return_tensors="pt").input_ids for table in tables]


if __name__ == "__main__":
    main()

"""Stable Diffusion's models as `diffusers` folders at their full published shapes, against `diffusers`.

    python -m tests.benchmarks.folders [ROW ...] [--folder DIR] [--cells N] [--narrow]

Networks of `diffusers` and `transformers` with random weights (exact in float16) are created, run, written in
float16 and freed one after the other. Then both sides load the whole folder in float32, which is timed, and
our model gets the same inputs. Needs a little more memory than the model in float32. Errors are
|a - b| / |b|, and infinite if the reference is almost constant.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from models.checkpoint import load
from models.latent_diffusion import LatentDiffusion
from models.networks.unet import timestep_embedding
from tests.benchmarks.family import LIMIT, compare, error
from tests.checkpoints.sd_folders import ROWS, Row, autoencoder, text_encoders, tokenizer_of, unet
from tests.checkpoints.tiny import fill_randomly

WIDTHS = (9, 15, 9, 9, 9, 9, 9, 9)
COLUMNS = ("row", "tensors", "parameters", "eps", "D", "E", "context", "pooled", "load s", "diffusers s")
SHARD = "2GB"
SIZES = (1024, 768, 0, 0, 1024, 768)


def main() -> None:
    compare(__doc__, ROWS, measure, COLUMNS, WIDTHS)


def measure(name: str, folder: Path, cells: int, narrow: bool) -> tuple[tuple, bool]:
    """A line of the table, and whether all its errors are within the limit."""
    row = ROWS[name]
    theirs, tensors = {}, 0
    for part, network, run in references(row, cells, narrow):
        theirs |= run(network)
        tensors += len(network.state_dict())
        network.half().save_pretrained(folder / part, variant="fp16", max_shard_size=SHARD)
        del network
        gc.collect()
    write_rest(row, folder, narrow)
    begin = time.monotonic()
    reference = getattr(diffusers, row.pipeline).from_pretrained(
        folder, variant="fp16", dtype=torch.float32, local_files_only=True
    )
    their_seconds = f"{time.monotonic() - begin:.1f}"
    del reference
    gc.collect()
    begin = time.monotonic()
    model = load(folder)
    seconds = f"{time.monotonic() - begin:.1f}"
    ours = our_outputs(row, model, cells)
    errors = {key: error(ours[key], theirs[key]) for key in theirs}
    count = sum(
        p.numel() for part in (model.unet, model.autoencoder, model.conditioner) for p in part.parameters()
    )
    errors["context"] = max(value for key, value in errors.items() if key.startswith("context"))
    line = tuple(errors.get(key, "-") for key in ("eps", "D", "E", "context", "pooled"))
    return (name, tensors, count, *line, seconds, their_seconds), max(errors.values()) <= LIMIT


def references(row: Row, cells: int, narrow: bool) -> Iterator[tuple[str, nn.Module, Callable[[Any], dict]]]:
    """Subfolder, network, and a function network -> its outputs, one network at a time."""
    yield "unet", random(unet(row, narrow), 0), lambda network: unet_outputs(row, network, cells)
    yield "vae", random(autoencoder(row, narrow), 1), lambda network: autoencoder_outputs(network, cells)
    several = len(row.texts) > 1
    for index, network in enumerate(text_encoders(row, narrow)):
        part = f"text_encoder{'_2' * index}"
        yield (
            part,
            random(network, 2 + index),
            lambda network, part=part: text_outputs(network, part, several),
        )


def random(network: nn.Module, seed: int) -> nn.Module:
    """Every parameter filled with a number that float16 can hold."""
    fill_randomly(network, seed)
    for parameter in network.parameters():
        parameter.data.copy_(parameter.data.half())
    return network.eval().requires_grad_(False)


def write_rest(row: Row, folder: Path, narrow: bool) -> None:
    """Writes the parts that are not networks: tokenizers, schedulers and model_index.json."""
    index = {
        "_class_name": row.pipeline,
        "_diffusers_version": "0.36.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    betas = {"beta_start": row.betas[0], "beta_end": row.betas[1], "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDIMScheduler(
        **betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=row.prediction
    )
    scheduler.save_pretrained(folder / "scheduler")
    tokenizer_of(narrow, row.pad if len(row.texts) == 1 else None).save_pretrained(folder / "tokenizer")
    if len(row.texts) > 1:
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"], "force_zeros_for_empty_prompt": True}
        tokenizer_of(narrow, row.pad).save_pretrained(folder / "tokenizer_2")
    if "Upscale" in row.pipeline:
        index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
        diffusers.DDPMScheduler(**betas).save_pretrained(folder / "low_res_scheduler")
    index |= {name: [None, None] if value is None else value for name, value in row.extra.items()}
    (folder / "model_index.json").write_text(json.dumps(index))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet_inputs(channels: int, context: int, pooled: int, cells: int) -> tuple[Tensor, ...]:
    """x (of an image that is not square), t, context and pooled text."""
    x, t = drawn(7, 2, channels, cells, 2 * cells), torch.tensor([1, 801])
    return x, t, drawn(8, 2, 77, context), drawn(9, 2, max(pooled, 1))


def unet_outputs(row: Row, network: nn.Module, cells: int) -> dict[str, Tensor]:
    config, given, pooled = network.config, {}, 0
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    x, t, context, text = unet_inputs(config.in_channels, config.cross_attention_dim, pooled, cells)
    if pooled:
        given = {"added_cond_kwargs": {"text_embeds": text, "time_ids": torch.tensor([SIZES, SIZES])}}
    if config.num_class_embeds:
        given = {"class_labels": torch.tensor([0, 350])}
    return {"eps": network(x, t, context, **given).sample}


def autoencoder_outputs(network: nn.Module, cells: int) -> dict[str, Tensor]:
    z, x = autoencoder_inputs(len(network.config.block_out_channels), cells)
    return {"D": network.decode(z).sample, "E": network.encode(x).latent_dist.mode()}


def autoencoder_inputs(levels: int, cells: int) -> tuple[Tensor, Tensor]:
    side = cells * 2 ** (levels - 1)
    return drawn(10, 1, 4, cells, cells), drawn(11, 1, 3, side, side).clamp(-1, 1)


def text_outputs(network: nn.Module, part: str, several: bool) -> dict[str, Tensor]:
    """Token vectors, of the penultimate layer if there are several encoders, and pooled text."""
    out = network(ids_of(network.config.vocab_size), output_hidden_states=True)
    pooled = {"pooled": out.text_embeds} if hasattr(out, "text_embeds") else {}
    return {f"context {part}": out.hidden_states[-2] if several else out.last_hidden_state} | pooled


def ids_of(vocabulary: int) -> Tensor:
    """Token ids of two texts, each ended by the last token."""
    ids = torch.randint(vocabulary - 2, (2, 77), generator=torch.Generator().manual_seed(12))
    ids[0, 9:] = ids[1, 60:] = vocabulary - 1
    return ids


def our_outputs(row: Row, model: LatentDiffusion, cells: int) -> dict[str, Tensor]:
    """Our model's outputs for the same inputs."""
    spec, levels, level, added = model.spec.unet, len(model.spec.autoencoder.channels), None, None
    x, t, context, text = unet_inputs(
        spec.in_channels, spec.context_width, spec.added_width - 6 * spec.size_width, cells
    )
    if spec.added_width:
        sizes = timestep_embedding(torch.tensor(SIZES), spec.size_width).flatten()
        added = torch.cat([text, sizes.expand(2, -1)], dim=1)
    if spec.noise_levels:
        level = torch.tensor([0, 350])
    z, image = autoencoder_inputs(levels, cells)
    outputs = {"eps": model.unet(x, t, context, added, level)}
    outputs |= {"D": model.autoencoder.decode(z), "E": model.autoencoder.encode(image)}
    for index, encoder in enumerate(model.conditioner.encoders):
        out = encoder(ids_of(encoder.spec.vocabulary))
        outputs |= {f"context text_encoder{'_2' * index}": out.tokens}
        outputs |= {} if out.pooled is None else {"pooled": out.pooled}
    return outputs


if __name__ == "__main__":
    main()

"""Compares every model of the latent diffusion paper, at its published shape, with other implementations.

    python -m tests.benchmarks.family [ROW ...] [--folder DIR] [--cells N] [--narrow]

Weights are random. Each model is written as a single file in the published layout, loaded, and compared on
small inputs; the references read the same file by their own code. Errors are |a - b| / |b|. Needs 1.5 times
the model's size in memory, and its size on disk.

References: `diffusers` for autoencoders, text transformers and the UNets whose structure it supports;
tests/helpers/reference_unet.py for the other UNets (the same number of heads at every width, or residual
blocks that resample); `transformers` for CLIP; a few lines of torch for class tables and segmentation maps.

With --narrow, the errors of D of kl-f16 and kl-f32 are mostly rounding in `diffusers`: in float64 both sides
agree to 3e-14; in float32 `diffusers` differs from that by 1e-5 and 6e-5, ours by 1e-6.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DModel
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection

from models.checkpoint import load
from models.conditioning.conditioner import ConditioningInput
from models.latent_diffusion import LatentDiffusion
from models.spec import AutoencoderSpec, ClassSpec, Condition, TokenSpec, UNetSpec
from tests.benchmarks import rivals
from tests.checkpoints.ldm_models import FIRST_STAGES, ROWS, shapes, thin, write
from tests.checkpoints.tiny import byte_tokenizer
from tests.helpers import reference_autoencoder, reference_token_transformer, reference_unet

LIMIT = 3e-5  # largest relative error
UNET, STAGE, CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
WIDTHS = (9, 15, 9, 9, 9, 9, 9)
COLUMNS = ("row", "tensors", "parameters", "eps", "D", "E", "context", "load s", "against")


def main() -> None:
    compare(__doc__, (*FIRST_STAGES, *ROWS), measure)


def compare(
    doc: str,
    all_rows: Collection[str],
    measure: Callable[[str, Path, int, bool], tuple[tuple, bool]],
    columns: tuple[str, ...] = COLUMNS,
    widths: tuple[int, ...] = WIDTHS,
) -> None:
    """The command line: prints one line per chosen row. Exits with 1 if an error is above the limit.

    measure: (row, folder to write in, latent cells along a side, narrow) -> the cells of the line, and
    whether all errors are within the limit.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", metavar="ROW", nargs="*", help=f"one of {', '.join(all_rows)} (default: all)")
    parser.add_argument("--folder", type=Path, help="where models are written, one at a time")
    parser.add_argument("--cells", type=int, default=16, help="along a side of latents (default: 16)")
    parser.add_argument("--narrow", action="store_true", help="small networks, for a trial run")
    args = parser.parse_args()
    if unknown := {*args.rows} - {*all_rows}:
        parser.error(f"unknown row: {', '.join(sorted(unknown))}")
    print(form(columns, widths), flush=True)
    within = True
    for name in args.rows or all_rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, torch.inference_mode():
            cells, fine = measure(name, Path(folder), args.cells, args.narrow)
        print(form(cells, widths), flush=True)
        within = within and fine
        gc.collect()
    raise SystemExit(0 if within else 1)


def form(cells: tuple, widths: tuple[int, ...] = WIDTHS) -> str:
    first, *others, last = map(text_of, cells)
    return (
        f"{first:<20}" + "".join(f"{text:>{w}}" for text, w in zip(others, widths, strict=True)) + "  " + last
    )


def text_of(cell: float | str) -> str:
    return f"{cell:.1e}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell


def measure(name: str, folder: Path, cells: int, narrow: bool) -> tuple[tuple, bool]:
    """A line of the table, and whether all its errors are within the limit."""
    file = write(folder, name, narrow)
    unet, stage, condition, _ = (
        shapes(name, narrow) if name in ROWS else (None, stage_of(name, narrow), None, 0)
    )
    gc.collect()
    begin = time.monotonic()
    model = load(file)
    seconds = f"{time.monotonic() - begin:.1f}"
    tensors = safe_open(file, framework="pt")
    eps, against = unet_error(unet, model, tensors, cells) if unet else ("-", "diffusers")
    d, e = stage_errors(stage, model, below(tensors, STAGE if unet else ""), cells)
    context = context_error(condition, model, tensors, folder)
    errors = [error for error in (eps, d, e, context) if isinstance(error, float)]
    parts = filter(None, (model.unet, model.autoencoder, model.conditioner))
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    line = (name, len(tensors.keys()), count, eps, d, e, context, seconds, against)
    return line, max(errors) <= LIMIT


def stage_of(name: str, narrow: bool) -> AutoencoderSpec:
    return thin(FIRST_STAGES[name]) if narrow else FIRST_STAGES[name]


def error(ours: Tensor, theirs: Tensor) -> float:
    """The relative error; infinite if the reference is almost constant, since then it would mean nothing."""
    return ((ours - theirs).norm() / theirs.norm()).item() if theirs.std() > 0.1 else float("inf")


def below(tensors: safe_open, prefix: str) -> dict[str, Tensor]:
    keys = [key for key in tensors.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a dict)
    return {key.removeprefix(prefix): tensors.get_tensor(key) for key in keys}


def unet_weights(tensors: safe_open) -> dict[str, Tensor]:
    """The UNet's averaged weights, or its last ones if the file has no averages, by their usual names."""
    keys = [key.removeprefix(UNET) for key in tensors.keys() if key.startswith(UNET)]  # noqa: SIM118
    averaged = {key: "model_ema.diffusion_model" + key.replace(".", "") for key in keys}
    held = {*tensors.keys()}
    return {key: tensors.get_tensor(a if a in held else UNET + key) for key, a in averaged.items()}


def unet_error(spec: UNetSpec, model: LatentDiffusion, tensors: safe_open, cells: int) -> tuple[float, str]:
    """The error of eps at two timesteps, on latents that are not square, and the reference's name."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, spec.in_channels, cells, 2 * cells, generator=generator)
    t, context = torch.tensor([1, 801]), None
    if spec.context_width:
        context = torch.randn(2, 5, spec.context_width, generator=generator)
    weights = unet_weights(tensors)
    reference = of_diffusers(weights, spec)
    if reference is None:
        theirs, against = (
            reference_unet.Reference(weights, spec)(x, t, context),
            "tests/helpers/reference_unet.py",
        )
    elif context is None:
        theirs, against = reference(x, t).sample, "diffusers"
    else:
        theirs, against = reference(x, t, context).sample, "diffusers"
    return error(model.unet(x, t, context), theirs), against


def of_diffusers(weights: Mapping[str, Tensor], spec: UNetSpec) -> torch.nn.Module | None:
    """The UNet of `diffusers` with these weights; None for a structure that it does not support."""
    if spec.residual_resampling or spec.scale_shift_norm:
        return None
    if spec.context_width:
        return rivals.unet(weights, spec)
    attends = [bool(depth) for depth in spec.transformer_depth]
    widths = {width // heads for width, heads, attend in
              zip(spec.channels, spec.heads, (*attends[:-1], True), strict=True) if attend}  # fmt: skip
    if len(widths) != 1:
        return None
    named = reference_unet.as_diffusers(weights, spec)
    with torch.device("meta"):
        network = UNet2DModel(
            in_channels=spec.in_channels, out_channels=spec.out_channels, block_out_channels=spec.channels,
            layers_per_block=spec.res_blocks, norm_num_groups=spec.groups, attention_head_dim=widths.pop(),
            down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
            up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in attends[::-1]],
        )  # fmt: skip
    network.load_state_dict(named, strict=True, assign=True)
    return network.eval()


def stage_errors(
    spec: AutoencoderSpec, model: LatentDiffusion, weights: dict[str, Tensor], cells: int
) -> tuple[float, float]:
    """The errors of D and of E."""
    reference = reference_autoencoder.reference(spec, weights)
    generator = torch.Generator().manual_seed(8)
    z = torch.randn(1, spec.latent_channels, cells, cells, generator=generator)
    x = torch.rand(1, 3, spec.factor * cells, spec.factor * cells, generator=generator) * 2 - 1
    encoded = reference.encode(x)
    theirs = encoded.latents if spec.codes else encoded.latent_dist.mode()
    d = error(model.autoencoder.decode(z), reference.decode(z).sample)
    return d, error(model.autoencoder.encode(x), theirs)


def context_error(
    condition: Condition | None, model: LatentDiffusion, tensors: safe_open, folder: Path
) -> float | str:
    """The error of the conditioner's output; "-" for a model without a conditioner."""
    generator = torch.Generator().manual_seed(9)
    if model.spec.texts:
        return clip_error(model, folder)
    if condition is None:
        return "-"
    if isinstance(condition, TokenSpec):
        weights = below(tensors, CONDITION)
        weights.pop("to_logits.weight", None)
        ids = torch.randint(condition.vocabulary, (2, condition.tokens), generator=generator)
        network = reference_token_transformer.reference(condition, weights)
        out = network(input_ids=ids, output_attentions=False, output_hidden_states=False, return_dict=True)
        return error(model.conditioner.from_ids(ids), out.last_hidden_state)
    if isinstance(condition, ClassSpec):
        numbers = torch.randint(condition.classes, (8,), generator=generator)
        table = tensors.get_tensor("cond_stage_model.embedding.weight")
        return error(model.conditioner(numbers), table[numbers][:, None])
    maps = torch.randint(condition.classes, (1, 16, 16), generator=generator)
    maps = maps.repeat_interleave(4, 1).repeat_interleave(4, 2)
    x = F.one_hot(maps, condition.classes).movedim(-1, 1).float()
    for _ in range(condition.halvings):
        x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
    mapper = tensors.get_tensor("cond_stage_model.channel_mapper.weight")
    scale = mapper.std()  # scales entries to about 1
    return error(model.conditioner(maps) / scale, F.conv2d(x, mapper) / scale)


def clip_error(model: LatentDiffusion, folder: Path) -> float:
    """The error of CLIP's text vectors of length 1, scaled so that their entries are about 1."""
    network = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder").eval()
    prompts = ["red apple", "a sunset behind a mountain range"]
    ids = byte_tokenizer()(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    theirs = F.normalize(network(input_ids=ids).text_embeds, dim=-1)
    ours = torch.cat([model.context_pair(ConditioningInput(prompt=prompt)).tokens[1] for prompt in prompts])
    return error(ours * theirs.shape[-1] ** 0.5, theirs * theirs.shape[-1] ** 0.5)


if __name__ == "__main__":
    main()

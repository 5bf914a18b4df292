"""Controls and image encoders at their full published shapes, against `diffusers` and `transformers`.

    python -m tests.benchmarks.adapters [ROW ...] [--folder DIR] [--cells N] [--narrow]

A network with random weights is run, written and freed; then ours is opened from the file and gets the same
inputs. Errors are |a - b| / |b| of the worst output: residuals, features, or image vectors. Needs a little
more memory than one network in float32.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from models.adapters.control_net import open_control
from models.adapters.controls import Rows
from models.adapters.image_encoder import normalised, open_image_encoder
from models.formats.diffusers_read import unet_spec
from models.spec import ModelSpec
from tests.benchmarks.family import LIMIT, compare, error
from tests.checkpoints import sd_folders
from tests.checkpoints.control_files import control_net, raw_t2i, t2i_adapter, write_single_file
from tests.checkpoints.sd_files import bare
from tests.checkpoints.tiny import fill_randomly, tiny_spec

WIDTHS = (9, 15, 9, 9)
COLUMNS = ("row", "tensors", "parameters", "error", "seconds", "file")
HINT, UNION_HINT = (16, 32, 96, 256), (48, 96, 192, 384)  # published widths of the convolutions on the image
SMALL = {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}


@dataclass(frozen=True)
class Case:
    """A control for a model of sd_folders.ROWS.

    options: of the builder; raw: written under the names of the first publication.
    """

    base: str
    build: Callable[..., nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    raw: bool = False


CONTROLS = {
    "sd1-controlnet": Case("sd1", control_net, raw=True),
    "sd2-controlnet": Case("sd2-base", control_net),
    "xl-controlnet": Case("xl", control_net),
    "xl-controlnet-small": Case("xl", control_net, SMALL),
    "xl-union": Case("xl", control_net, {"union": 8}),
    "sd1-t2i": Case("sd1", t2i_adapter, raw=True),
    "sd1-t2i-light": Case("sd1", t2i_adapter, {"light": True}),
    "xl-t2i": Case("xl", t2i_adapter),
}
ENCODERS = {  # width, layers, heads, intermediate, projected, activation
    "clip-vit-l": (1024, 24, 16, 4096, 768, "quick_gelu"),
    "clip-vit-h": (1280, 32, 16, 5120, 1024, "gelu"),
    "clip-vit-bigg": (1664, 48, 16, 8192, 1280, "gelu"),
}


def main() -> None:
    compare(__doc__, (*CONTROLS, *ENCODERS), measure, COLUMNS, WIDTHS)


def measure(name: str, folder: Path, cells: int, narrow: bool) -> tuple[tuple, bool]:
    """A line of the table, and whether its error is within the limit."""
    check = control if name in CONTROLS else image_encoder
    network, file, wanted, run = check(name, folder, cells, narrow)
    tensors, count = len(network.state_dict()), sum(weight.numel() for weight in network.parameters())
    del network
    gc.collect()
    begin = time.monotonic()
    ours = run(file)
    seconds = f"{time.monotonic() - begin:.1f}"
    worst = max(error(mine, theirs) for mine, theirs in zip(ours, wanted, strict=True))
    layout = "folder" if file.is_dir() else "single file"
    return (name, tensors, count, worst, seconds, layout), worst <= LIMIT


Check = tuple[nn.Module, Path, Sequence[Tensor], Callable[[Path], Sequence[Tensor]]]


def control(name: str, folder: Path, cells: int, narrow: bool) -> Check:
    """A control, its file, its outputs, and a function from the file to ours."""
    case = CONTROLS[name]
    unet = bare(partial(sd_folders.unet, sd_folders.ROWS[case.base], narrow))
    hint = UNION_HINT if "union" in case.options else HINT
    options = {} if case.build is t2i_adapter else {"conditioning_embedding_out_channels": hint}
    network = case.build(unet, **options, **case.options)
    rows, added = inputs(unet, cells)
    pixels = torch.rand(1, 3, 8 * cells, 16 * cells, generator=torch.Generator().manual_seed(6))
    pixels = pixels.expand(2, -1, -1, -1)
    wanted = outputs(network, rows, pixels, added)
    file = folder / name
    if not case.raw:
        network.save_pretrained(file)
    elif case.build is t2i_adapter:
        file = folder / f"{name}.safetensors"
        save_file(raw_t2i(network), file)
    else:
        file = write_single_file(folder / f"{name}.safetensors", network)
    model = replace(tiny_spec(), unet=unet_spec(as_lists(unet.config)))
    return network, file, wanted, partial(our_outputs, model, rows, pixels)


def as_lists(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it is in a file."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def inputs(unet: UNet2DConditionModel, cells: int) -> tuple[Rows, dict[str, Any]]:
    """Two rows, and the pooled vector as `diffusers` takes it."""
    g, config = torch.Generator().manual_seed(7), unet.config
    x = torch.randn(2, 4, cells, 2 * cells, generator=g)
    context = torch.randn(2, 5, config["cross_attention_dim"], generator=g)
    t, pooled, added = torch.tensor([1, 801]), None, {}
    if sizes := config["addition_time_embed_dim"]:
        width = config["projection_class_embeddings_input_dim"] - 6 * sizes
        texts, numbers = torch.randn(2, width, generator=g), torch.arange(12).reshape(2, 6)
        added = {"added_cond_kwargs": {"text_embeds": texts, "time_ids": numbers}}
        pooled = torch.cat([texts, unet.add_time_proj(numbers.flatten()).reshape(2, -1)], dim=-1)
    return Rows(x, t, context, pooled), added


def outputs(network: nn.Module, rows: Rows, pixels: Tensor, added: dict[str, Any]) -> list[Tensor]:
    """The residuals or features of a network of `diffusers`."""
    kinds = getattr(network.config, "num_control_type", 0)
    if not hasattr(network, "controlnet_mid_block"):
        return list(network(pixels))
    union = {"control_type": torch.eye(kinds)[[3, 3]], "control_type_idx": [3]} if kinds else {}
    hint = [pixels] if kinds else pixels
    down, middle = network(
        rows.x, rows.t, rows.context, controlnet_cond=hint, return_dict=False, **union, **added
    )
    return [*down, middle]


def our_outputs(model: ModelSpec, rows: Rows, pixels: Tensor, file: Path) -> list[Tensor]:
    control = open_control(file, model)
    types = torch.tensor([3, 3]) if control.types else None
    found = control.inputs(control.prepare(pixels), rows, types)
    tensors = (*found.skips, *found.features, found.middle)
    return [x for x in tensors if x is not None]


def image_encoder(name: str, folder: Path, cells: int, narrow: bool) -> Check:
    """An image encoder, its folder, its outputs, and a function from the folder to ours."""
    width, layers, heads, intermediate, projection, activation = ENCODERS[name]
    shrink = 8 if narrow else 1
    config = CLIPVisionConfig(
        hidden_size=width // shrink, intermediate_size=intermediate // shrink,
        num_hidden_layers=layers // shrink, num_attention_heads=heads, image_size=224, patch_size=14,
        projection_dim=projection // shrink, hidden_act=activation,
    )  # fmt: skip
    network = CLIPVisionModelWithProjection(config).eval()
    fill_randomly(network, 1)
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(6))
    out = network(normalised(pixels, 224), output_hidden_states=True)
    network.save_pretrained(folder / name)
    wanted = [out.image_embeds, out.hidden_states[-2]]
    return network, folder / name, wanted, lambda file: open_image_encoder(file).encode(pixels)


if __name__ == "__main__":
    main()

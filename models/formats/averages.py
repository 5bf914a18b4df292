"""Chooses between the two sets of UNet weights of a file: trained, and averaged over training (EMA)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

from models.formats import keymaps
from models.formats.ldm import UNET, Shapes

WeightChoice = Literal["auto", "ema", "raw"]

# Parts of the names of a UNet's tensors. Names of averages have no dots, so that all names must be listed.
MAX_BLOCKS, MAX_LAYERS, MAX_DEPTH = 40, 3, 16
LEAVES = ("weight", "bias")
RES_BLOCK = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
LAYER = ("op", "conv", "norm", "qkv", "proj_in", "proj_out", *RES_BLOCK)
TRANSFORMER = (
    *(
        f"{attention}.{part}"
        for attention in ("attn1", "attn2")
        for part in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)
ENDS = (
    "time_embed.0",
    "time_embed.2",
    "time_embed.cond_proj",
    "out.0",
    "out.2",
    "label_emb.0.0",
    "label_emb.0.2",
    "label_emb",
)


class Chosen(NamedTuple):
    """averaged: whether the averages are used. note: for the user, if the choice needs one."""

    averaged: bool
    note: str | None = None


def choose(shapes: Shapes, stable_diffusion: bool, choice: WeightChoice) -> Chosen:
    """Which weights are used.

    By default the trained ones of Stable Diffusion, since other programs do not read its averages, and the
    averages of the paper's models, as in the paper's code.
    """
    averages = {key for key in shapes if key.startswith(keymaps.EMA) and not keymaps.is_ignored(key)}
    trained = [key for key in shapes if key.startswith(UNET)]
    if not averages:
        return Chosen(False)
    if not trained:
        return Chosen(True, "the file has the UNet's averaged weights (EMA) only: they are used")
    missing = sum(keymaps.averaged(key) not in averages for key in trained)
    if missing:
        return Chosen(
            False,
            f"the UNet's averaged weights (EMA) lack {missing} of {len(trained)} tensors: its trained "
            "weights are used",
        )
    averaged = choice == "ema" or (choice == "auto" and not stable_diffusion)
    if not stable_diffusion and choice == "auto":
        return Chosen(True)
    used, other, option = ("averaged", "trained", "raw") if averaged else ("trained", "averaged", "ema")
    return Chosen(
        averaged,
        f"the UNet's {used} weights are used; --weights {option} uses the {other} ones that the file has too",
    )


def with_averages_alone(shapes: Shapes) -> Shapes:
    """The shapes; a UNet with averages only is added under the names of trained weights."""
    if any(key.startswith(UNET) for key in shapes):
        return shapes
    return {**shapes, **dict(renamed(shapes))}


def renamed(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    for key, shape in shapes.items():
        if key.startswith(keymaps.EMA) and (name := dotted_names().get(key)):
            yield name, shape


@cache
def dotted_names() -> Mapping[str, str]:
    """Name of an average -> name of the trained tensor, for every tensor that a UNet may have."""
    layers = [*LAYER, *(f"transformer_blocks.{i}.{part}" for i in range(MAX_DEPTH) for part in TRANSFORMER)]
    blocks = [f"{side}_blocks.{number}" for side in ("input", "output") for number in range(MAX_BLOCKS)]
    modules = [
        f"{block}.{index}.{layer}" for block, index, layer in product(blocks, range(MAX_LAYERS), layers)
    ]
    modules += [f"middle_block.{index}.{layer}" for index, layer in product(range(MAX_LAYERS), layers)]
    modules += [*ENDS, *(f"input_blocks.0.{index}" for index in range(MAX_LAYERS))]
    names = [f"{UNET}{module}.{leaf}" for module, leaf in product(modules, LEAVES)]
    return {keymaps.averaged(name): name for name in names}

"""Recognises T2I-Adapters by their configuration or their tensors. Imports no torch."""

from __future__ import annotations

import re

from models.adapter_specs import T2IAdapterSpec
from models.formats.config_files import Config, shortened
from models.formats.diffusers_read import only, per_level
from models.formats.ldm import Shapes, count

CLASS = "T2IAdapter"
FULL, FULL_XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
PREFIX = "adapter."  # of all tensors in the layout of diffusers
XL_FACTOR, FACTOR = 16, 8
XL_HALVED = 2  # the only feature of the XL kind that has half the size of the one before
RAW_RES_BLOCK = re.compile(r"body\.(\d+)\.(block[12]\..*|in_conv\..*)")
RAW_LIGHT_BLOCK = re.compile(r"body\.(\d+)\.body\.(.*)")


def halves_of(kind: str, count: int) -> tuple[bool, ...]:
    """Which features have half the size of the one before."""
    return tuple(index == XL_HALVED if kind == FULL_XL else index > 0 for index in range(count))


def spec_of_config(config: Config) -> T2IAdapterSpec:
    """Raises ValueError, KeyError or TypeError for a configuration that is not supported."""
    kind = config.get("adapter_type", FULL)
    if kind not in (FULL, FULL_XL, LIGHT):
        raise ValueError(f"adapter_type is {shortened(kind)}; supported: {FULL}, {FULL_XL}, {LIGHT}")
    value = config.get("channels", [320, 640, 1280, 1280])
    channels = per_level(value, len(value) if isinstance(value, list) and value else 1, "channels")
    channels = (*channels, channels[-1]) if kind == LIGHT else channels
    return T2IAdapterSpec(
        channels=channels,
        halves=halves_of(kind, len(channels)),
        res_blocks=only(config.get("num_res_blocks", 2), "num_res_blocks"),
        image_channels=only(config.get("in_channels", 3), "in_channels"),
        factor=only(config.get("downscale_factor", FACTOR), "downscale_factor"),
        light=kind == LIGHT,
    )


def native_names(keys: Shapes) -> dict[str, str]:
    """Native name -> name in a file, of a file of diffusers or of the first publication.

    The latter numbers the residual blocks of all features through, two for each feature.
    """
    names = {}
    for key in keys:
        native = key.removeprefix(PREFIX)
        if match := RAW_LIGHT_BLOCK.fullmatch(native):
            native = f"body.{match[1]}.resnets.{match[2]}"
        elif (match := RAW_RES_BLOCK.fullmatch(native)) and "body.0.block1.weight" in keys:
            level, block = divmod(int(match[1]), 2)
            inner = match[2] if match[2].startswith("in_conv") else f"resnets.{block}.{match[2]}"
            native = f"body.{level}.{inner}"
        names[native] = key
    return names


def spec_of_tensors(shapes: Shapes) -> T2IAdapterSpec:
    """Of a file's tensors under native names. Raises KeyError or IndexError if they are no adapter's."""
    levels, light = count(shapes, "body.{}.resnets.0.block1.weight"), "body.0.out_conv.weight" in shapes
    last = "out_conv" if light else "resnets.0.block1"
    inputs = shapes["body.0.in_conv.weight" if light else "conv_in.weight"][1]
    # Squares of 8 or 16 pixels, grey or in colour, are folded into channels.
    factor = XL_FACTOR if inputs in (XL_FACTOR**2, 3 * XL_FACTOR**2) else FACTOR
    kind = FULL_XL if factor == XL_FACTOR else LIGHT if light else FULL
    return T2IAdapterSpec(
        channels=tuple(shapes[f"body.{level}.{last}.weight"][0] for level in range(levels)),
        halves=halves_of(kind, levels),
        res_blocks=count(shapes, "body.0.resnets.{}.block1.weight"),
        image_channels=inputs // factor**2,
        factor=factor,
        light=light,
    )

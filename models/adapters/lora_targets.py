"""The weights of a model that LoRAs change, under every name that files have for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from models.checkpoint.meta import shapes_only
from models.checkpoint.parts import make_networks
from models.conditioning.conditioner import Conditioner, TextConditioner
from models.formats import keymaps
from models.formats.adapters import NETWORKS
from models.networks.unet import UNet
from models.spec import ModelSpec

KOHYA_UNET = "lora_unet_"
KOHYA_TEXTS = (("lora_te_", "lora_te1_"), ("lora_te2_",))  # of each text encoder


class Target(NamedTuple):
    """A weight that can be changed. network: unet or conditioner, of LatentDiffusion."""

    network: str
    parameter: str
    shape: tuple[int, ...]


def find_targets(spec: ModelSpec) -> dict[str, Target]:
    """Name in a file -> weight, for all weights of a model and all their names."""
    with shapes_only():
        networks = make_networks(spec)
    targets: dict[str, Target] = {}
    for names, target in (*unet_targets(networks.unet), *text_targets(networks.conditioner)):
        targets |= dict.fromkeys(names, target)
    return targets


def unet_targets(unet: UNet | None) -> Iterator[tuple[set[str], Target]]:
    """Each weight of a UNet, with its names in diffusers' and in CompVis's layout."""
    if unet is None:
        return
    table = keymaps.unet(unet.spec)
    for native, shape in layer_shapes(unet):
        names = {native}
        if any(native == module or native.startswith(module + ".") for module in table):
            names.add(keymaps.rename(native, table))
        dotted = names | {f"{NETWORKS[0]}.{name}" for name in names}
        yield (
            dotted | {kohya_name(KOHYA_UNET, name) for name in names},
            Target("unet", f"{native}.weight", shape),
        )


def text_targets(conditioner: Conditioner | None) -> Iterator[tuple[set[str], Target]]:
    """Each weight of CLIP's text encoders, with its names."""
    if not isinstance(conditioner, TextConditioner):
        return
    for index, encoder in enumerate(conditioner.encoders):
        for native, shape in layer_shapes(encoder):
            inner = native.removeprefix("transformer.")
            names = {inner, keymaps.TEXT_PREFIX + inner}
            prefixed = {f"{NETWORKS[1 + index]}.{name}" for name in names}
            prefixed |= {kohya_name(prefix, name) for prefix in KOHYA_TEXTS[index] for name in names}
            bare = names if index == 0 else set()
            yield prefixed | bare, Target("conditioner", f"encoders.{index}.{native}.weight", shape)


def layer_shapes(network: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and weight shape of each linear layer and convolution."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            yield name, tuple(module.weight.shape)


def kohya_name(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_")

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

LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.GroupNorm | nn.LayerNorm
KOHYA_UNET = ("lora_unet_", "lycoris_")
COMFY_UNET = "diffusion_model."
KOHYA_TEXTS = (("lora_te_", "lora_te1_"), ("lora_te2_",))  # of each text encoder
COMFY_TEXTS = ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.")


class Target(NamedTuple):
    """A weight that can be changed. network: unet or conditioner, of LatentDiffusion."""

    network: str
    parameter: str
    shape: tuple[int, ...]


class Layer(NamedTuple):
    """A linear layer, a convolution or a norm."""

    weight: Target
    bias: Target | None


def find_layers(spec: ModelSpec) -> dict[str, Layer]:
    """Name in a file -> layer, for all layers of a model that LoRAs can change, and all their names."""
    with shapes_only():
        networks = make_networks(spec)
    layers: dict[str, Layer] = {}
    texts = text_layers(networks.conditioner, spec.encoder_numbers)
    for names, layer in (*unet_layers(networks.unet), *texts):
        layers |= dict.fromkeys(names, layer)
    return layers


def unet_layers(unet: UNet | None) -> Iterator[tuple[set[str], Layer]]:
    """Each layer of a UNet, with its names in diffusers' and in CompVis's layout."""
    if unet is None:
        return
    table = keymaps.unet(unet.spec)
    for native, layer in layers_of(unet, "unet", ""):
        names = {native}
        if any(native == module or native.startswith(module + ".") for module in table):
            names.add(keymaps.rename(native, table))
        dotted = names | {f"{NETWORKS[0]}.{name}" for name in names} | {COMFY_UNET + native}
        yield dotted | {kohya_name(prefix, name) for prefix in KOHYA_UNET for name in names}, layer


def text_layers(
    conditioner: Conditioner | None, numbers: tuple[int, ...]
) -> Iterator[tuple[set[str], Layer]]:
    """Each layer of CLIP's text encoders, with its names. numbers: as ModelSpec.encoder_numbers."""
    if not isinstance(conditioner, TextConditioner):
        return
    for place, (index, encoder) in enumerate(zip(numbers, conditioner.encoders, strict=True)):
        for native, layer in layers_of(encoder, "conditioner", f"encoders.{place}."):
            inner = native.removeprefix("transformer.")
            names = {inner, keymaps.TEXT_PREFIX + inner}
            prefixed = {
                prefix + name for prefix in (f"{NETWORKS[1 + index]}.", COMFY_TEXTS[index]) for name in names
            }
            prefixed |= {kohya_name(prefix, name) for prefix in KOHYA_TEXTS[index] for name in names}
            bare = names if index == 0 else set()
            yield prefixed | bare, layer


def layers_of(network: nn.Module, part: str, prefix: str) -> Iterator[tuple[str, Layer]]:
    """Each linear layer, convolution and norm, by name. prefix: before parameters' names in `part`."""
    for name, module in network.named_modules():
        if isinstance(module, LAYERS):
            weight, bias = (
                Target(part, f"{prefix}{name}.{leaf}", tuple(tensor.shape)) if tensor is not None else None
                for leaf, tensor in (("weight", module.weight), ("bias", module.bias))
            )
            if weight:
                yield name, Layer(weight, bias)


def kohya_name(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_")

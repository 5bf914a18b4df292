"""Opens a model in a single file of the CompVis layout, or a first stage alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint.parts import (
    PROJECTION,
    Networks,
    OpenedModel,
    Part,
    text_names,
    without_text_prefix,
)
from models.checkpoint.separate_unet import open_unet
from models.checkpoint.separate_vae import open_vae
from models.checkpoint.weights import TEXT_FILES, Weights, map_weights, open_network
from models.conditioning.conditioner import TextConditioner
from models.conditioning.text_encoder import TextEncoder
from models.errors import CheckpointError
from models.formats import keymaps, ldm, stable_diffusion
from models.formats.identify import Source
from models.formats.safetensors import Stored
from models.formats.stable_diffusion import EncoderLocation

NATIVE_PREFIX = "transformer."  # of all of a text encoder's parameters except its projection
FUSED_ATTENTION = ".attn.in_proj_"  # q, k and v in one tensor


def open_single_file(
    source: Source, file: Path, networks: Networks, device: torch.device | str
) -> OpenedModel:
    """networks: on the meta device. Raises CheckpointError if a file is missing or cannot be read."""
    weights, spec = map_weights(file, source.header, device), source.spec
    duplicates = duplicate_first_stage(weights.stored)
    left = {key for key in weights.stored if not keymaps.is_ignored(key)} - duplicates.keys()
    texts = text_parts(source.text_encoders, networks, weights, left)
    left -= {key for location in source.text_encoders for key in left if key.startswith(location.prefix)}
    parts = []
    averages = {key for key in left if key.startswith(keymaps.EMA)}
    if networks.unet and source.unet:
        parts.append(open_unet(source.unet, networks.unet, device, source.allow_pickle))
        left -= {key for key in left if key.startswith(ldm.UNET)}
    elif networks.unet:
        names = {key: ldm.UNET + key for key in networks.unet.state_dict()}
        if (other := ldm.UNET + ldm.OTHER_GUIDANCE_KEY) in weights.stored:
            names[ldm.GUIDANCE_KEY] = other
        if source.averaged:
            left -= set(names.values())
            names = {key: keymaps.averaged(name) for key, name in names.items()}
        keys = {key for key in left if key.startswith(ldm.UNET)} | (averages if source.averaged else set())
        parts.append(Part(networks.unet, names, weights.selected(keys)))
    left -= averages
    stage = ldm.FIRST_STAGE if networks.unet else ""
    own = networks.conditioner if spec.condition else None
    inside = None if source.lacks_vae or source.vae else networks.autoencoder
    for network, prefix in ((own, ldm.CONDITION), (inside, stage)):
        if network:
            names = {key: prefix + key for key in network.state_dict()}
            keys = {key for key in left if key.startswith(prefix)}
            parts.append(Part(network, names, weights.selected(keys)))
    parts += texts
    if source.vae:
        part = open_vae(source.vae, networks.autoencoder.spec, device, source.allow_pickle)[1]
        parts.append(part._replace(network=networks.autoencoder))
    rest = left.difference(*(part.weights.stored for part in parts))
    leftover = {key for key in rest if key.startswith(keymaps.NETWORK_PREFIXES)}
    if spec.texts and not source.text_encoders:
        parts.append(adjacent_text_part(source, networks, device))
    return OpenedModel(
        source,
        networks,
        tuple(parts),
        leftover=tuple(sorted(leftover)),
        ignored=tuple(sorted(rest - leftover)),
        duplicates=duplicates,
        weights=weights,
    )


def duplicate_first_stage(stored: Mapping[str, Stored]) -> dict[str, str]:
    """Copy -> original, of a second first stage, which inpainting models have as their conditioner."""
    if ldm.CONDITION + "encoder.conv_in.weight" not in stored:
        return {}
    return {
        key: ldm.FIRST_STAGE + key.removeprefix(ldm.CONDITION)
        for key in stored
        if key.startswith(ldm.CONDITION) and not keymaps.is_ignored(key)
    }


def text_parts(
    locations: tuple[EncoderLocation, ...], networks: Networks, weights: Weights, keys: Collection[str]
) -> list[Part]:
    """The text encoders in a file; keys: of the file's tensors that are used."""
    conditioner = networks.conditioner
    if not isinstance(conditioner, TextConditioner):
        return []
    parts = []
    for location, encoder in zip(locations, conditioner.encoders, strict=False):
        own = [key for key in keys if key.startswith(location.prefix)]
        used = weights.selected([key for key in own if not is_unused(key, encoder, location)])
        if location.open_clip:
            used = split_open_clip(used)
        parts.append(Part(encoder, text_tensor_names(encoder, location, own), used))
    return parts


def adjacent_text_part(source: Source, networks: Networks, device: torch.device | str) -> Part:
    """CLIP's text encoder with its projection, in a folder next to the file."""
    folder = source.folder / "text_encoder"
    weights = without_text_prefix(open_network(folder, TEXT_FILES, device, source.allow_pickle))
    # A complete CLIP has an image encoder too.
    keys = [key for key in weights.stored if not key.startswith(keymaps.CLIP_IMAGE_PREFIXES)]
    if PROJECTION not in keys:
        raise CheckpointError(
            f"{folder} has no {PROJECTION}; expected CLIP's text encoder with its projection"
        )
    assert isinstance(networks.conditioner, TextConditioner)
    encoder = networks.conditioner.encoders[0]
    return Part(encoder, text_names(encoder), weights.selected(keys))


def text_tensor_names(
    encoder: TextEncoder, location: EncoderLocation, keys: Collection[str]
) -> dict[str, str]:
    """Native parameter -> name in the file, after split_open_clip(); keys: the encoder's, in the file."""
    if location.open_clip:
        table = keymaps.open_clip(encoder.spec.layers)
        return {key: location.prefix + keymaps.rename(key, table) for key in encoder.state_dict()}
    prefix = location.prefix + keymaps.TEXT_PREFIX
    if not any(key.startswith(prefix) for key in keys):
        prefix = location.prefix  # as later versions of `transformers` name them
    return {key: prefix + key.removeprefix(NATIVE_PREFIX) for key in encoder.state_dict()}


def is_unused(key: str, encoder: TextEncoder, location: EncoderLocation) -> bool:
    """Whether a tensor is of the layer or of the projection that Stable Diffusion 2 does not use."""
    if not location.open_clip or encoder.spec.pooled:
        return False
    last_layer = f"{location.prefix}transformer.resblocks.{encoder.spec.layers}."
    return is_projection(key.removeprefix(location.prefix)) or key.startswith(last_layer)


def is_projection(name: str) -> bool:
    return name in (stable_diffusion.PROJECTION, stable_diffusion.LINEAR_PROJECTION)


def split_open_clip(weights: Weights) -> Weights:
    """The same tensors with q, k and v of each attention separate, and the projection as a linear layer's."""
    stored: dict[str, Stored] = {}
    read, pieces = weights.read, keymaps.PIECES
    for key, entry in weights.stored.items():
        if FUSED_ATTENTION in key and entry.shape and entry.shape[0] % len(pieces) == 0:
            third = replace(entry, shape=(entry.shape[0] // len(pieces), *entry.shape[1:]))
            stored |= {f"{key}.{piece}": third for piece in pieces}
        elif key.endswith("." + stable_diffusion.PROJECTION):
            stored.setdefault(key, replace(entry, shape=entry.shape[::-1]))
        elif key.endswith(
            "." + stable_diffusion.LINEAR_PROJECTION
        ):  # takes precedence: it needs no transposition
            stored[key.removesuffix(".weight")] = entry
        else:
            stored[key] = entry

    def read_piece(name: str) -> Tensor:
        if name.endswith("." + stable_diffusion.PROJECTION):
            linear = name + ".weight"
            return read(linear) if linear in weights.stored else read(name).T.contiguous()
        if name not in weights.stored:
            fused, _, piece = name.rpartition(".")
            return read(fused).chunk(len(pieces))[pieces[piece]]
        return read(name)

    return Weights(stored, read_piece, weights.release)

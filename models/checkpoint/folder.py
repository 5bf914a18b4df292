"""Opens a model in a diffusers folder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from models.checkpoint.parts import (
    Networks,
    OpenedModel,
    Part,
    autoencoder_names,
    normalise_attention,
    text_names,
    unet_names,
    without_text_prefix,
)
from models.checkpoint.separate_unet import open_unet
from models.checkpoint.weights import NETWORK_FILES, TEXT_FILES, open_network, other_variant
from models.conditioning.conditioner import TextConditioner
from models.formats.diffusers_read import autoencoder_folder
from models.formats.diffusers_tables import TEXT_ENCODERS
from models.formats.identify import Source


def open_folder(source: Source, networks: Networks, device: torch.device | str) -> OpenedModel:
    """networks: on the meta device. Raises CheckpointError if a file is missing or cannot be read."""
    path, (unet, autoencoder, conditioner) = source.folder, networks
    read = partial(open_network, device=device, allow_pickle=source.allow_pickle)
    parts = []
    if unet and source.unet:
        parts.append(open_unet(source.unet, unet, device, source.allow_pickle))
    elif unet:
        parts.append(Part(unet, unet_names(unet), read(path / "unet", NETWORK_FILES)))
    weights = normalise_attention(read(autoencoder_folder(path), NETWORK_FILES))
    parts.append(Part(autoencoder, autoencoder_names(autoencoder), weights))
    if isinstance(conditioner, TextConditioner):
        for encoder, number in zip(conditioner.encoders, source.spec.encoder_numbers, strict=True):
            weights = without_text_prefix(read(path / TEXT_ENCODERS[number], TEXT_FILES))
            parts.append(Part(encoder, text_names(encoder), weights))
        if layout := conditioner.layout:
            names = {key: key for key in layout.state_dict()}
            parts.append(Part(layout, names, read(path / "layout", NETWORK_FILES)))
    return OpenedModel(source, networks, tuple(parts), variants=tuple(variants(source, networks)))


def variants(source: Source, networks: Networks) -> Iterator[str]:
    """Sentences about networks of which a folder has other files than usual."""
    path = source.folder
    folders = [(path / "unet", NETWORK_FILES)] if networks.unet and not source.unet else []
    folders.append((autoencoder_folder(path), NETWORK_FILES))
    if isinstance(networks.conditioner, TextConditioner):
        folders += [(path / TEXT_ENCODERS[number], TEXT_FILES) for number in source.spec.encoder_numbers]
    for folder, names in folders:
        if sentence := other_variant(folder, names):
            yield sentence

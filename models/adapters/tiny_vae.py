"""A tiny VAE (TAESD) that decodes a model's latents, beside the model's own VAE."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from models.checkpoint.meta import shapes_only
from models.checkpoint.parts import load_part, native_part
from models.checkpoint.weights import (
    NETWORK_FILES,
    open_network,
    open_weights,
)
from models.errors import CheckpointError
from models.formats.config_files import read_json
from models.networks.tiny_autoencoder import FACTOR, TinyDecoder
from models.spec import AutoencoderSpec

COMBINED = "taesd_decoder."  # prefix in files with encoder and decoder
DIFFUSERS = re.compile(r"decoder\.layers\.(\d+)\.(.+)")  # numbers are smaller by 1: the clamp is no layer
CONFIG = {"act_fn": "relu", "upsample_fn": "nearest", "scaling_factor": 1.0}  # the only supported values


def open_decoder(
    path: Path,
    model: AutoencoderSpec,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> TinyDecoder:
    """The decoder in a published file, in one with the encoder too, or in a folder or file of diffusers.

    model: the autoencoder whose latents it decodes. Raises CheckpointError if it does not fit.
    """
    if path.is_dir():
        check_config(path)
        weights = open_network(path, NETWORK_FILES, device, allow_pickle)
    else:
        weights = open_weights(path, device, allow_pickle)
    names = decoder_names(weights.stored)
    if "1.weight" not in names:
        raise CheckpointError(f"{path} is not a tiny VAE: it has no decoder")
    weights = weights.renamed(names)
    channels, width = weights.stored["1.weight"].shape[1::-1]
    if (channels, FACTOR) != (model.latent_channels, model.factor):
        raise CheckpointError(
            f"the tiny VAE {path} does not fit: its latents have {channels} channels and cells of {FACTOR} "
            f"pixels, the model's {model.latent_channels} and {model.factor}"
        )
    with shapes_only():
        network = TinyDecoder(channels, width)
    load_part(native_part(network, weights), f"the tiny VAE {path} does not fit", dtype, device)
    return network


def decoder_names(keys: Iterable[str]) -> dict[str, str]:
    """Name in TinyDecoder -> name in the file, of the decoder's tensors."""
    names = {}
    for key in keys:
        if match := DIFFUSERS.fullmatch(key):
            names[f"{int(match[1]) + 1}.{match[2]}"] = key
        elif key.startswith(COMBINED):
            names[key.removeprefix(COMBINED)] = key
        elif key[0].isdigit():
            names[key] = key
    return names


def check_config(folder: Path) -> None:
    """Raise CheckpointError for a folder of another network, or of one that is computed in another way."""
    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind != "AutoencoderTiny":
        raise CheckpointError(f"the tiny VAE {folder} is a {kind}; expected an AutoencoderTiny")
    for name, expected in CONFIG.items():
        if config.get(name, expected) != expected:
            raise CheckpointError(f"the tiny VAE {folder} has {name} {config[name]}; expected {expected}")

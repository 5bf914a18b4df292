"""Opens a VAE from a separate folder or file."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch

from models.checkpoint.meta import shapes_only
from models.checkpoint.parts import Part, autoencoder_names, check_part, normalise_attention
from models.checkpoint.weights import (
    NETWORK_FILES,
    Weights,
    open_network,
    open_weights,
)
from models.errors import CheckpointError
from models.formats import keymaps, ldm
from models.formats.config_files import read_json
from models.formats.diffusers_read import autoencoder_spec, translated
from models.formats.vae_files import DIFFUSERS_KEY
from models.networks.autoencoder import Autoencoder
from models.spec import AutoencoderSpec

NOT_SHAPE = (
    "sample_size",
    "scale_factor",
    "latents_mean",
    "latents_std",
    "upcast",
)  # fields of the spec that may differ
AVERAGES = "model_ema."  # prefix of averaged weights, which some files contain too


def open_vae(
    path: Path, own: AutoencoderSpec, device: torch.device | str = "cpu", allow_pickle: bool = False
) -> tuple[AutoencoderSpec, Part]:
    """The autoencoder in a diffusers vae folder or in a single file, without its weights yet.

    own: spec of the model's autoencoder, whose scale factor is kept. Names in a file may be those of a
    CompVis autoencoder, of a complete CompVis model (first_stage_model.), or of diffusers. Raises
    CheckpointError if the shape or the scale factor differs.
    """
    spec = folder_spec(path, own) if path.is_dir() else own
    with shapes_only():
        network = Autoencoder(spec)
    if path.is_dir():
        weights = open_network(path, NETWORK_FILES, device, allow_pickle)
    else:
        weights = first_stage(open_weights(path, device, allow_pickle))
    if path.is_dir() or any(DIFFUSERS_KEY in key for key in weights.stored):
        weights, names = normalise_attention(weights), autoencoder_names(network)
    else:
        names = {key: key for key in network.state_dict()}
    part = Part(network, names, weights)
    check_part(part, f"the VAE {path} does not fit")
    return spec, part


def folder_spec(path: Path, own: AutoencoderSpec) -> AutoencoderSpec:
    """The spec of the VAE in a folder. Raises CheckpointError if it is not that of the model's."""
    file = path / "config.json"
    config = read_json(file)
    spec = translated(file, autoencoder_spec, config)
    for name in (field.name for field in fields(AutoencoderSpec) if field.name not in NOT_SHAPE):
        mine, theirs = getattr(own, name), getattr(spec, name)
        if mine != theirs:
            raise CheckpointError(f"the VAE {path} does not fit: its {name} is {theirs}, the model's {mine}")
    if "scaling_factor" in config and abs(spec.scale_factor / own.scale_factor - 1) > 1e-4:
        factors = f"{spec.scale_factor:g}, the model's {own.scale_factor:g}"
        raise CheckpointError(f"the VAE {path} is for another model: its scaling_factor is {factors}")
    return replace(own, upcast=bool(config.get("force_upcast", own.upcast)))


def first_stage(weights: Weights) -> Weights:
    """The first stage of a single file, under names without a prefix."""
    complete = any(key.startswith(ldm.FIRST_STAGE) for key in weights.stored)
    prefix = ldm.FIRST_STAGE if complete else ""
    keys = [key for key in weights.stored if key.startswith(prefix) and is_used(key)]
    return weights.renamed({key.removeprefix(prefix): key for key in keys})


def is_used(key: str) -> bool:
    return not (keymaps.is_ignored(key) or key.startswith(AVERAGES))

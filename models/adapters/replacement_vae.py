"""A separate autoencoder (VAE) in the place of a model's own, of the same shape."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch

from models.checkpoint.folder import (
    NETWORK_FILES,
    Part,
    Weights,
    assign,
    autoencoder_names,
    faults,
    listed,
    newer,
    open_network,
    open_weights,
)
from models.checkpoint.meta import shapes_only
from models.errors import CheckpointError
from models.formats import keymaps, ldm
from models.formats.config_files import read_json
from models.formats.diffusers_read import autoencoder_spec, translated
from models.latent_diffusion import LatentDiffusion, autoencoder_dtype
from models.networks.autoencoder import Autoencoder
from models.spec import AutoencoderSpec

FREE = ("sample_size", "scale_factor", "upcast")  # of its shape, what is no part of the network
DIFFUSERS = ".down_blocks."  # in keys of the diffusers layout only


def replaced(
    bundle: LatentDiffusion,
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> LatentDiffusion:
    """The model with the autoencoder at `path`. Raises CheckpointError as open_vae() does."""
    spec, part = open_vae(path, bundle.spec.autoencoder, device, allow_pickle)
    assign(part, autoencoder_dtype(spec, dtype, device))
    autoencoder = part.network.requires_grad_(False).eval().to(device)
    return LatentDiffusion(
        replace(bundle.spec, autoencoder=spec), bundle.unet, autoencoder, bundle.conditioner
    )


def open_vae(
    path: Path, own: AutoencoderSpec, device: torch.device | str = "cpu", allow_pickle: bool = False
) -> tuple[AutoencoderSpec, Part]:
    """The autoencoder in a diffusers vae folder or in a single file, without its weights yet.

    own: of the model that takes it, whose factor of latents stays. A file may hold bare keys, keys of a
    whole model of CompVis's (first_stage_model.), or those of diffusers. Raises CheckpointError for one that
    has another shape or says that its latents have another factor.
    """
    spec = described(path, own) if path.is_dir() else own
    with shapes_only():
        network = Autoencoder(spec)
    names = {key: key for key in network.state_dict()}
    if path.is_dir():
        weights, names = (
            newer(open_network(path, NETWORK_FILES, device, allow_pickle)),
            autoencoder_names(network),
        )
    else:
        weights = first_stage(open_weights(path, device, allow_pickle))
        if any(DIFFUSERS in key for key in weights.stored):
            weights, names = newer(weights), autoencoder_names(network)
    part = Part(network, names, weights)
    wrong = [listed(what, keys) for what, keys in faults(part).items() if keys]
    if wrong:
        raise CheckpointError(f"the VAE {path} does not fit: {'; '.join(wrong)}")
    return spec, part


def described(path: Path, own: AutoencoderSpec) -> AutoencoderSpec:
    """What a folder says it is. Raises CheckpointError where that is not the model's."""
    file = path / "config.json"
    config = read_json(file)
    spec = translated(file, autoencoder_spec, config)
    for name in (field.name for field in fields(AutoencoderSpec) if field.name not in FREE):
        mine, theirs = getattr(own, name), getattr(spec, name)
        if mine != theirs:
            raise CheckpointError(f"the VAE {path} does not fit: its {name} is {theirs}, the model's {mine}")
    if "scaling_factor" in config and abs(spec.scale_factor / own.scale_factor - 1) > 1e-4:
        factors = f"{spec.scale_factor:g}, the model's {own.scale_factor:g}"
        raise CheckpointError(f"the VAE {path} is another model's: its scaling_factor is {factors}")
    return replace(own, upcast=bool(config.get("force_upcast", own.upcast)))


def first_stage(weights: Weights) -> Weights:
    """The first stage of a single file, by bare keys."""
    whole = any(key.startswith(ldm.FIRST_STAGE) for key in weights.stored)
    prefix = ldm.FIRST_STAGE if whole else ""
    ours = [key for key in weights.stored if key.startswith(prefix) and not keymaps.is_ignored(key)]
    return weights.renamed({key.removeprefix(prefix): key for key in ours})

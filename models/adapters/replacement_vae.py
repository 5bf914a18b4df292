"""A separate VAE that replaces a model's own autoencoder, of the same shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from models.checkpoint.parts import assign
from models.checkpoint.separate_vae import open_vae
from models.latent_diffusion import LatentDiffusion, autoencoder_dtype
from models.networks.autoencoder import Autoencoder

__all__ = ["open_vae", "with_vae"]


def with_vae(
    model: LatentDiffusion,
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> LatentDiffusion:
    """The model with the autoencoder at `path`. Raises CheckpointError as open_vae() does."""
    spec, part = open_vae(path, model.spec.autoencoder, device, allow_pickle)
    assign(part, autoencoder_dtype(spec, dtype, device) or dtype)
    autoencoder = part.network.requires_grad_(False).eval().to(device)
    assert isinstance(autoencoder, Autoencoder)
    return LatentDiffusion(replace(model.spec, autoencoder=spec), model.unet, autoencoder, model.conditioner)

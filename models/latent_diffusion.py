"""The bundle: denoiser, autoencoder, conditioner and schedule of one model."""

from __future__ import annotations

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.conditioner import TextConditioner
from models.denoiser import Denoiser
from models.schedule import Schedule
from models.spec import ModelSpec
from models.unet import UNet


class LatentDiffusion:
    """A loaded latent diffusion model (Rombach et al. 2021, figure 3)."""

    def __init__(
        self, spec: ModelSpec, unet: UNet, autoencoder: Autoencoder, conditioner: TextConditioner
    ) -> None:
        self.spec = spec
        self.unet = unet
        self.autoencoder = autoencoder
        self.conditioner = conditioner
        self.schedule = Schedule(spec.schedule)
        self.denoiser = Denoiser(unet, self.schedule)

    def encode(self, x: Tensor) -> Tensor:
        """Picture x (B, 3, H, W) in [-1, 1] -> scaled z (B, C, H/f, W/f), the mode, float32."""
        return self.spec.autoencoder.scale_factor * self.autoencoder.encode(x).float()

    def decode(self, z: Tensor) -> Tensor:
        """Scaled z (B, C, h, w) -> x (B, 3, f*h, f*w), about in [-1, 1], float32."""
        return self.autoencoder.decode(z / self.spec.autoencoder.scale_factor).float()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LatentDiffusion:
        """Move and convert every network in place; returns itself."""
        for network in (self.unet, self.autoencoder, self.conditioner):
            network.to(device=device, dtype=dtype)
        self.denoiser = Denoiser(self.unet, self.schedule)
        return self

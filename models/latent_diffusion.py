"""The bundle: denoiser, autoencoder, conditioner and schedule of one model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.conditioner import TextConditioner
from models.denoiser import Denoiser, guide
from models.samplers import plan, step
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

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance_scale: float
    ) -> Tensor:
        """One picture a prompt by guided DDIM, all in one batch at the default size: the service's
        arithmetic without its queue. -> x (B, 3, H, W), float32."""
        defaults = self.spec.defaults
        shape = self.spec.latent_shape(defaults.width, defaults.height)
        context = self.conditioner(["", *prompts])  # (1 + B, L, C)
        context = torch.cat([context[:1].expand(len(prompts), -1, -1), context[1:]])
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        x = x.to(context.device)
        for line in torch.from_numpy(plan(self.schedule, "ddim", steps).lines):
            t = line[0].to(x.device).expand(2 * len(x))
            eps_uncond, eps_cond = self.denoiser(torch.cat([x, x]), t, context).chunk(2)
            x = step(x, guide(eps_uncond, eps_cond, guidance_scale), line.to(x.device).expand(len(x), -1))
        return self.decode(x)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LatentDiffusion:
        """Move and convert every network in place; returns itself."""
        for network in (self.unet, self.autoencoder, self.conditioner):
            network.to(device=device, dtype=dtype)
        self.denoiser = Denoiser(self.unet, self.schedule)
        return self

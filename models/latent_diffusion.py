"""The bundle: denoiser, autoencoder, conditioner and schedule of one model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.conditioner import Conditioner, LayoutProjection, TextConditioner, make_conditioner
from models.denoiser import Denoiser, guide
from models.samplers import plan, step
from models.schedule import Schedule
from models.spec import ModelSpec
from models.text_encoder import TextEncoder
from models.unet import UNet

TILE = 32  # cells of a side: 256 pixels where a cell covers 8


class Known(NamedTuple):
    """Scaled latent (C, h, w) of a picture that is 0 where the mask (1, h, w) is 1: what is there already."""

    z: Tensor
    mask: Tensor


class LatentDiffusion:
    """A loaded latent diffusion model (Rombach et al. 2021, figure 3)."""

    def __init__(
        self,
        spec: ModelSpec,
        unet: UNet | None,
        autoencoder: Autoencoder,
        conditioner: Conditioner | None,
    ) -> None:
        """Without a UNet: a first stage alone. Without a conditioner: one that has no weights of its own."""
        self.spec = spec
        self.unet = unet
        self.autoencoder = autoencoder
        self.conditioner = conditioner
        self.schedule = Schedule(spec.schedule)
        self.denoiser = Denoiser(unet, self.schedule) if unet else None
        self._gray: dict[tuple[int, int], Tensor] = {}

    def encode(self, x: Tensor) -> Tensor:
        """Picture x (B, 3, H, W) in [-1, 1] -> scaled z (B, C, H/f, W/f), the mode, float32."""
        return self.spec.autoencoder.scale_factor * self.autoencoder.encode(x).float()

    def decode(self, z: Tensor) -> Tensor:
        """Scaled z (B, C, h, w) -> x (B, 3, f*h, f*w), about in [-1, 1], float32."""
        return self.autoencoder.decode(z / self.spec.autoencoder.scale_factor).float()

    def decode_tiles(self, z: Tensor, tile: int = TILE) -> Tensor:
        """decode() by squares of `tile` cells that overlap by a quarter and fade into each other.

        For a picture that does not fit in memory whole. It differs from decode(): D's norms and attention
        see a tile at a time. z (1, C, h, w) -> x (1, 3, f*h, f*w), on the CPU.
        """
        f, (h, w) = self.spec.autoencoder.factor, z.shape[-2:]
        total = torch.zeros(1, self.spec.autoencoder.picture_channels, f * h, f * w)
        weight = torch.zeros(1, 1, f * h, f * w)
        for top in starts(h, tile):
            for left in starts(w, tile):
                x = self.decode(z[:, :, top : top + tile, left : left + tile].contiguous()).cpu()
                fade = ramp(x.shape[-2], f * tile // 4)[:, None] * ramp(x.shape[-1], f * tile // 4)
                area = ..., slice(f * top, f * top + x.shape[-2]), slice(f * left, f * left + x.shape[-1])
                total[area] += fade * x
                weight[area] += fade
        return total / weight

    def beside(
        self, h: int, w: int, regions: Tensor | None = None, known: Known | None = None
    ) -> Tensor | None:
        """What the UNet takes beside a latent of h x w cells, without guidance's condition and with it.

        regions (h, w): numbers of labels from 1, 0 for none. Without `known` everything is to be painted.
        -> (2, channels, h, w) float32, or None where it takes nothing.
        """
        spec, device = self.spec, next(self.unet.parameters()).device
        parts = []
        if spec.mask_channels:
            z, mask = known or (self.encode_gray(h, w), torch.ones(1, h, w, device=device))
            parts.append(torch.cat([mask, z]).expand(2, -1, -1, -1))
        if spec.layout_channels:
            layout = torch.zeros(2, spec.layout_channels, h, w, device=device)
            if regions is not None:
                layout[1] = self.conditioner.from_regions(regions)
            parts.append(layout)
        return torch.cat(parts, dim=1) if parts else None

    def encode_gray(self, h: int, w: int) -> Tensor:
        """Scaled latent (C, h, w) of a picture of which nothing is known; made once a size."""
        if (h, w) not in self._gray:
            autoencoder, f = self.spec.autoencoder, self.spec.autoencoder.factor
            device = next(self.unet.parameters()).device
            x = torch.zeros(1, autoencoder.picture_channels, f * h, f * w, device=device)
            self._gray[h, w] = self.encode(x)[0]
        return self._gray[h, w]

    def copy(self, dtype: torch.dtype) -> LatentDiffusion:
        """The same model with weights in another type; the tokenizer, which has none, is shared."""
        holder = (
            self.conditioner.encoder if isinstance(self.conditioner, TextConditioner) else self.conditioner
        )
        tokenizer = getattr(holder, "tokenizer", None)
        conditioner = deepcopy(self.conditioner, {id(tokenizer): tokenizer})
        return LatentDiffusion(self.spec, deepcopy(self.unet), deepcopy(self.autoencoder), conditioner).to(
            dtype=dtype
        )

    def with_autoencoder(self, dtype: torch.dtype) -> LatentDiffusion:
        """The same model with E and D of its own, in another type."""
        autoencoder = deepcopy(self.autoencoder).to(dtype=dtype)
        return LatentDiffusion(self.spec, self.unet, autoencoder, self.conditioner)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        beside: Sequence[Tensor] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """One picture a prompt by guided DDIM, all in one batch: the service's arithmetic without its queue.

        beside: of each picture, as self.beside() makes it; size: width and height, the default's if missing.
        -> x (B, 3, H, W), float32.
        """
        defaults = self.spec.defaults
        shape = self.spec.latent_shape(*(size or (defaults.width, defaults.height)))
        if beside is None and self.spec.beside:
            beside = [self.beside(*shape[1:])] * len(prompts)
        pairs = None if beside is None else torch.stack(list(beside), dim=1).flatten(0, 1)  # (2 B, C', h, w)
        context = self.conditioner(["", *prompts])  # (1 + B, L, C)
        context = torch.cat([context[:1].expand(len(prompts), -1, -1), context[1:]])
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        x = x.to(context.device)[:, None]  # (B, 1, C, h, w): DDIM remembers nothing
        for line in torch.from_numpy(plan(self.schedule, "ddim", steps).lines):
            t = line[0].to(x.device).expand(2 * len(x))
            eps_uncond, eps_cond = self.denoiser(torch.cat([x[:, 0]] * 2), t, context, pairs).chunk(2)
            x = step(x, guide(eps_uncond, eps_cond, guidance_scale), line.to(x.device).expand(len(x), -1))
        return self.decode(x[:, 0])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LatentDiffusion:
        """Move and convert every network in place; returns itself."""
        for network in (self.unet, self.autoencoder, self.conditioner):
            if network is not None:
                network.to(device=device, dtype=dtype)
        self.denoiser = Denoiser(self.unet, self.schedule) if self.unet else None
        self._gray.clear()
        return self


def to_uint8(x: Tensor) -> Tensor:
    """Pictures of about [-1, 1] as whole numbers from 0 to 255, uint8, of the same shape."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def starts(size: int, tile: int) -> list[int]:
    """Where tiles begin along a side, overlapping by at least a quarter; the last ends with the side."""
    stride = tile - tile // 4
    return [*range(0, max(size - tile, 0), stride), max(size - tile, 0)]


def ramp(size: int, fade: int) -> Tensor:
    """(size,): weights of a tile along one side, rising and falling over `fade` pixels at its ends."""
    distance = torch.arange(size) + 1
    return torch.minimum(distance, distance.flip(0)).clamp(max=max(fade, 1)) / max(fade, 1)


def weights_in(spec: ModelSpec) -> int:
    """How many numbers the networks of a model hold, without making them."""
    with torch.device("meta"):
        networks = [Autoencoder(spec.autoencoder)]
        if spec.unet:
            networks.append(UNet(spec.unet))
        if spec.text:
            networks.append(TextEncoder(spec.text, None))
        if spec.condition:
            networks.append(make_conditioner(spec.condition))
        if spec.layout_channels:
            networks.append(LayoutProjection(spec.text.width, spec.layout_channels))
    return sum(weight.numel() for network in networks for weight in network.parameters())

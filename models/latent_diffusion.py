"""The bundle: denoiser, autoencoder, conditioner and schedule of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from cachetools import LRUCache
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from models.conditioning.conditioner import Asked, Conditioner, TextConditioner
from models.conditioning.text_encoder import Context
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet, timestep_embedding
from models.sampling.denoiser import Denoiser, guide
from models.sampling.samplers import plan, step
from models.sampling.schedule import Schedule
from models.spec import AutoencoderSpec, ModelSpec
from models.tiles import cut, merge

OVERFLOWING = torch.float16  # what a first stage that its spec says so of does not run in
TILE = 32  # cells of a side: 256 pixels where a cell covers 8
ROWS = 16  # tiles that are enlarged at once
SIZES = 8  # of which the latent of a hidden picture is kept


class Known(NamedTuple):
    """What is there already: the scaled latent (C, h, w) of a picture without what is hidden, and the mask
    (1, h, w), both as the UNet takes them."""

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
        self._hidden: LRUCache[tuple[int, int], Tensor] = LRUCache(SIZES)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.autoencoder.post_quant_conv.weight.device

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
        tiles = cut(*z.shape[-2:], tile)
        areas = (tiles.slices(index) for index in range(len(tiles.corners)))
        parts = (self.decode(z[..., rows, columns].contiguous()) for rows, columns in areas)
        whole = merge((pixels_last(x[0]) for x in parts), tiles, self.spec.autoencoder.factor)
        return torch.from_numpy(whole).movedim(-1, 0)[None]

    def contexts(self, asked: Asked) -> Context | None:
        """What the UNet is told, without guidance's condition and with it: tokens (2, L, C) that it attends
        to, and pooled (2, P) where it takes that. The same twice where nothing guides; None where it is told
        nothing."""
        context = self.conditioner.contexts(asked) if self.conditioner else None
        if context is None or not self.spec.unet.size_width:
            return context
        sizes = self.sizes(*(asked.size or (self.spec.defaults.width, self.spec.defaults.height)))
        return context._replace(pooled=torch.cat([context.pooled.float(), sizes.expand(2, -1)], dim=-1))

    def context_shape(self, asked: Asked) -> tuple[int, int] | None:
        """(L, C) of the context of what is asked; None where there is none."""
        shape = self.spec.context_shape
        if not (asked.reading.chunked and self.spec.reads_prompts):
            return shape
        return shape[0] * self.conditioner.chunks(asked), shape[1]

    def sizes(self, width: int, height: int) -> Tensor:
        """What a UNet that knows sizes is told of a picture: as large before it was cut, cut nowhere, and as
        large now (Podell et al. 2023, section 2.2), each number embedded like a timestep: (P,)."""
        numbers = torch.tensor([height, width, 0, 0, height, width], device=self.device)
        return timestep_embedding(numbers, self.spec.unet.size_width).flatten()

    def beside(
        self, h: int, w: int, regions: Tensor | None = None, known: Known | None = None
    ) -> Tensor | None:
        """What the UNet takes beside a latent of h x w cells, without guidance's condition and with it.

        regions: numbers of labels from 1, 0 for none, one of every spec.label_cell pixels. Without `known`
        everything is to be painted. -> (2, channels, h, w) float32, or None where it takes nothing.
        """
        spec, device = self.spec, self.device
        parts = []
        if spec.mask_channels:
            z, mask = known or (self.encode_hidden(h, w), torch.ones(1, h, w, device=device))
            both = [mask, z] if spec.masking.mask_first else [z, mask]
            parts.append(torch.cat(both).expand(2, -1, -1, -1))
        if spec.layout_channels:
            layout = torch.zeros(2, spec.layout_channels, h, w, device=device)
            if regions is not None:
                layout[1] = self.conditioner.from_regions(regions)
            parts.append(layout)
        return torch.cat(parts, dim=1) if parts else None

    def known(self, x: Tensor, hidden: Tensor) -> Known:
        """What is there of a picture x (1, 3, H, W) where `hidden` (H, W), bool, is not true."""
        masking, factor = self.spec.masking, self.spec.autoencoder.factor
        mask = hidden.float()[None]  # (1, H, W)
        if masking.nearest:
            mask = interpolate(mask[None], scale_factor=1 / factor, mode="nearest")[0]
        else:
            mask = max_pool2d(mask, factor)
        z = self.encode(torch.where(hidden, masking.hidden, x))[0]
        return Known(z, masking.kept + (1 - masking.kept) * mask)

    def with_noise(self, low: Tensor, noise: Tensor, level: int) -> Tensor:
        """A low-resolution picture and noise, both of any one shape -> as the UNet takes it at that level."""
        if not self.spec.upscaling.noise:
            return low
        signal = Schedule(self.spec.upscaling.noise).alpha_bar[level]
        return float(signal**0.5) * low + float((1 - signal) ** 0.5) * noise

    def encode_hidden(self, h: int, w: int) -> Tensor:
        """Scaled latent (C, h, w) of a picture of which nothing is known; kept of the last sizes."""
        if (h, w) not in self._hidden:
            autoencoder, f = self.spec.autoencoder, self.spec.autoencoder.factor
            x = torch.zeros(1, autoencoder.picture_channels, f * h, f * w, device=self.device)
            self._hidden[h, w] = self.encode(x + self.spec.masking.hidden)[0]
        return self._hidden[h, w]

    def copy(self, dtype: torch.dtype) -> LatentDiffusion:
        """The same model with weights in another type; the tokenizer, which has none, is shared."""
        texts = isinstance(self.conditioner, TextConditioner)
        holders = self.conditioner.encoders if texts else [self.conditioner]
        tokenizers = [getattr(holder, "tokenizer", None) for holder in holders]
        conditioner = deepcopy(self.conditioner, {id(tokenizer): tokenizer for tokenizer in tokenizers})
        return LatentDiffusion(self.spec, deepcopy(self.unet), deepcopy(self.autoencoder), conditioner).to(
            dtype=dtype
        )

    def with_autoencoder(self, dtype: torch.dtype) -> LatentDiffusion:
        """The same model with E and D of its own, in another type."""
        autoencoder = deepcopy(self.autoencoder).to(dtype=dtype)
        return LatentDiffusion(self.spec, self.unet, autoencoder, self.conditioner)

    def sample(
        self,
        asked: Sequence[str | Asked],
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        beside: Sequence[Tensor] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """One picture of each that is asked for, by DDIM, all in one batch: the service's arithmetic without
        its queue.

        asked: a prompt by itself asks for no more. guidance_scale: 1 where the model is not guided. beside:
        of each picture, as self.beside() makes it, for one to inpaint; size: width and height, the default's
        if missing. -> x (B, 3, H, W), float32.
        """
        asked = [Asked(prompt=one) if isinstance(one, str) else one for one in asked]
        defaults, rows = self.spec.defaults, told_rows(guidance_scale)
        shape = self.spec.latent_shape(*(size or (defaults.width, defaults.height)))
        if beside is None and self.spec.beside:
            beside = [self.beside(*shape[1:], one.regions) for one in asked]
        pairs = None if beside is None else by_row(beside, rows)  # (R B, C', h, w), R 1 or 2
        told = [self.contexts(one if one.size else one._replace(size=size)) for one in asked]
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        eps = self.predictor(told, pairs, guidance_scale)
        return self.decode(self.denoise(noise.to(self.device), steps, eps))

    def predictor(
        self,
        contexts: Sequence[Context | None],
        beside: Tensor | None,
        guidance_scale: float,
        noise_level: Tensor | None = None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """x (B, C, h, w), t (B,) -> guided eps, of B images.

        contexts: of each, as self.contexts() makes them; beside (R B, C', h, w) and noise_level (R B,): of
        every row, R 1 or 2, all without guidance's condition first.
        """
        rows, first = told_rows(guidance_scale), contexts[0]
        count = rows.stop - rows.start
        tokens = by_row([one.tokens for one in contexts], rows) if first else None
        pooled = (
            by_row([one.pooled for one in contexts], rows) if first and first.pooled is not None else None
        )

        def eps(x: Tensor, t: Tensor) -> Tensor:
            x, t = torch.cat([x] * count), torch.cat([t] * count)
            out = self.denoiser(x, t, tokens, pooled, beside, noise_level=noise_level)
            half = len(out) // count
            return guide(out[:half], out[-half:], guidance_scale)

        return eps

    def denoise(self, x: Tensor, steps: int, eps: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """DDIM from noise x (B, C, h, w) to a latent of its shape; eps: x, t (B,) -> eps."""
        x = x[:, None]  # DDIM remembers nothing
        for line in torch.from_numpy(plan(self.schedule, "ddim", steps).lines).to(x.device):
            lines = line.expand(len(x), -1)
            x = step(x, eps(x[:, 0], lines[:, 0]), lines)
        return x[:, 0]

    def upscale(
        self,
        low: Tensor,
        seeds: Sequence[int],
        steps: int,
        noise_level: int = 0,
        asked: Sequence[str | Asked] | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Pictures low (B, 3, h, w) -> x (B, 3, f*h, f*w), float32 on the CPU, by tiles and by DDIM.

        The service's arithmetic without its queue. h and w must be multiples of the UNet's factor. asked: of
        each picture, for a model that reads prompts; an empty one if missing.
        """
        asked = [Asked(one) if isinstance(one, str) else one for one in asked or [""] * len(low)]
        count = 2 if told_rows(guidance_scale) == slice(0, 2) else 1
        told, contexts = [self.contexts(one) for one in asked], []
        tiles = cut(*low.shape[-2:], self.spec.tile)
        areas = [tiles.slices(index) for index in range(len(tiles.corners))]
        x, beside = [], []
        for picture, seed, context in zip(low, seeds, told, strict=True):
            contexts += [context] * len(areas)
            noise, noised = self.start_upscaling(picture, seed, noise_level)
            x += [noise[:, rows, columns] for rows, columns in areas]
            beside += [self.beside_tile(noised[:, rows, columns]) for rows, columns in areas]
        parts = []
        for begin in range(0, len(x), ROWS):
            part = slice(begin, begin + ROWS)
            z, given = torch.stack(x[part]), torch.stack(beside[part])
            level = self.noise_levels([noise_level] * count * len(z))
            eps = self.predictor(contexts[part], torch.cat([given] * count), guidance_scale, level)
            z = self.denoise(z, steps, eps)
            parts += map(pixels_last, self.decode(self.completed(z, given)))
        f, n = self.spec.autoencoder.factor, len(areas)
        wholes = [merge(parts[begin : begin + n], tiles, f) for begin in range(0, len(parts), n)]
        return torch.from_numpy(np.stack(wholes)).movedim(-1, 1)

    def start_upscaling(self, low: Tensor, seed: int, noise_level: int) -> tuple[Tensor, Tensor]:
        """What a picture (3, h, w) is enlarged from: noise (C, h, w), and itself with noise (3, h, w)."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.spec.autoencoder.latent_channels, *low.shape[1:], generator=generator)
        grain = torch.randn(low.shape, generator=generator)
        return noise.to(low.device), self.with_noise(low, grain.to(low.device), noise_level)

    def beside_tile(self, noised: Tensor) -> Tensor:
        """What the UNet takes beside a tile's latent: noised (3, h, w), and its own latent where it is a
        residual's base -> (C', h, w)."""
        if not self.spec.upscaling.residual:
            return noised
        base = self.encode(resample(noised[None].contiguous(), self.spec.autoencoder.factor))[0]
        return torch.cat([noised, base])

    def completed(self, z: Tensor, beside: Tensor | None) -> Tensor:
        """What D takes: z (B, C, h, w), with its base where it is a residual; beside (B.., C', h, w)."""
        if self.spec.upscaling and self.spec.upscaling.residual:
            return z + beside[: len(z), self.spec.autoencoder.picture_channels :]
        return z

    def noise_levels(self, levels: Sequence[int]) -> Tensor | None:
        """(B,) for the UNet; None for one that is told none."""
        if not self.spec.unet.noise_levels:
            return None
        return torch.tensor(levels, device=self.device)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LatentDiffusion:
        """Move and convert every network in place, E and D to what their spec allows; returns itself."""
        for network in filter(None, (self.unet, self.conditioner)):
            network.to(device=device, dtype=dtype)
        stage = stage_dtype(self.spec.autoencoder, dtype, device or self.device)
        self.autoencoder.to(device=device, dtype=stage)
        self.denoiser = Denoiser(self.unet, self.schedule) if self.unet else None
        self._hidden.clear()
        return self


def stage_dtype(
    spec: AutoencoderSpec, dtype: torch.dtype | None, device: torch.device | str | None
) -> torch.dtype | None:
    """The type of E and D where all else has `dtype`: another where that overflows, bfloat16 where the device
    has arithmetic for it. None stays None."""
    if not spec.upcast or dtype != OVERFLOWING:
        return dtype
    cuda = torch.device(device or "cpu").type == "cuda"
    return torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported(False) else torch.float32


def resample(low: Tensor, factor: int) -> Tensor:
    """Pictures (B, 3, h, w) in about [-1, 1] -> (B, 3, f*h, f*w) in [-1, 1], by bicubic interpolation."""
    return interpolate(low, scale_factor=factor, mode="bicubic").clamp(-1, 1)


def told_rows(guidance_scale: float) -> slice:
    """Which rows of (without guidance's condition, with it) an image needs: at 0 and 1 one says it all."""
    return {0.0: slice(0, 1), 1.0: slice(1, 2)}.get(guidance_scale, slice(0, 2))


def by_row(parts: Sequence[Tensor], rows: slice) -> Tensor:
    """These rows of each (2, ...): all first rows, then all second ones."""
    return torch.stack([part[rows] for part in parts], dim=1).flatten(0, 1)


def pixels_last(x: Tensor) -> np.ndarray:
    """x (3, H, W) -> (H, W, 3), on the CPU."""
    return x.movedim(0, -1).cpu().numpy()


def to_uint8(x: Tensor) -> Tensor:
    """Pictures of about [-1, 1] as whole numbers from 0 to 255, uint8, of the same shape."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

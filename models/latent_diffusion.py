"""A loaded model: UNet, autoencoder, conditioner and schedule, and sampling with them in one process.

`sample` and `upscale` use the same plans, steps and guidance as the service (service/device/batch.py),
without its queue. Tests compare the service with them, and training evaluates models with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from models.conditioning.conditioner import (
    Conditioner,
    ConditioningInput,
    SegmentationConditioner,
    TextConditioner,
    TokenConditioner,
)
from models.conditioning.text_encoder import Context
from models.enlargement import follow_low_resolution, resample
from models.networks.autoencoder import Autoencoder
from models.networks.tiling import Axes, tiled, wrapped
from models.networks.tiny_autoencoder import TinyDecoder
from models.networks.unet import UNet, timestep_embedding
from models.sampling.denoiser import Denoiser
from models.sampling.guidance import (
    DEFAULT_IMAGE_GUIDANCE,
    StepRows,
    cfg_rows,
    edit_rows,
    guide,
    row_count,
)
from models.sampling.samplers import plan
from models.sampling.schedule import Schedule
from models.sampling.step import step
from models.sampling.table import ALPHA, SIGMA, T
from models.spec import AutoencoderSpec, ModelSpec, UpscalingSpec
from models.tiles import MAX_WHOLE_PIXELS, cut, merge
from models.transfer import upload

DECODING_TILE_CELLS = 32  # side of a tile in latent cells: 256 pixels at f = 8
LARGE_TILE_CELLS = 64  # side of these tiles in latent cells
AESTHETIC_SCORES = (2.5, 6.0)  # that SDXL's refiner is given: unconditional, conditional
UPSCALING_BATCH_TILES = 16  # tiles upscaled at once
MAX_CACHED_MASKED_LATENTS = 8  # latents of fully masked images, one per size


class MaskedImage(NamedTuple):
    """An image to inpaint, in the form that the UNet takes."""

    z: Tensor  # (C, h, w), scaled latent of the image with its masked pixels overwritten
    mask: Tensor  # (1, h, w), 1 where the image is repainted, else spec.masking.unmasked_value


class LatentDiffusion:
    """A loaded latent diffusion model (Rombach et al. 2021, figure 3)."""

    def __init__(
        self,
        spec: ModelSpec,
        unet: UNet | None,
        autoencoder: Autoencoder,
        conditioner: Conditioner | None,
    ) -> None:
        """unet: None for an autoencoder alone; conditioner: None for a model without one."""
        self.spec = spec
        self.unet = unet
        self.autoencoder = autoencoder
        self.conditioner = conditioner
        self.schedule = Schedule(spec.schedule)
        self.denoiser = Denoiser(unet, self.schedule) if unet else None
        self.compiled_decoder: Callable[[Tensor], Tensor] | None = None  # in place of autoencoder.decode
        self._masked_latents: LRUCache[tuple[int, int], Tensor] = LRUCache(MAX_CACHED_MASKED_LATENTS)
        self.tiny_decoder: TinyDecoder | None = None  # decodes latents faster and less exactly
        self._tiled: dict[Axes, TiledLatentDiffusion] = {}

    def tiled(self, axes: Axes) -> LatentDiffusion:
        """This model with circular padding, for images that repeat without a seam; it shares all weights.

        The same object each time, which lives as long as this model.
        """
        if axes not in self._tiled:
            self._tiled[axes] = TiledLatentDiffusion(self, axes)
        return self._tiled[axes]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.autoencoder.post_quant_conv.weight.device

    @property
    def is_compiled(self) -> bool:
        """Whether the UNet and the decoder run compiled."""
        return self.compiled_decoder is not None

    @property
    def upscaling(self) -> UpscalingSpec:
        """How this upscaler is conditioned. Raises ValueError for other models."""
        if self.spec.upscaling is None:
            raise ValueError(f"{self.spec.name} is not an upscaler")
        return self.spec.upscaling

    def encode(self, x: Tensor) -> Tensor:
        """Image x (B, 3, H, W) in [-1, 1] -> scaled z (B, C, H/f, W/f), the mode, float32.

        Images of more than MAX_WHOLE_PIXELS are encoded in tiles, so that the memory stays bounded.
        """
        if x.shape[-2] * x.shape[-1] > MAX_WHOLE_PIXELS:
            return torch.stack([self.encode_tiles(image[None], LARGE_TILE_CELLS)[0] for image in x])
        return self.spec.autoencoder.scale_factor * self.normalised(self.autoencoder.encode(x).float())

    def decode(self, z: Tensor) -> Tensor:
        """Scaled z (B, C, h, w) -> x (B, 3, f*h, f*w), about in [-1, 1], float32.

        Images of more than MAX_WHOLE_PIXELS are decoded in tiles, so that the memory stays bounded.
        """
        if self.decodes_in_tiles(*z.shape[-2:]):
            return torch.cat([self.decode_tiles(latent[None], LARGE_TILE_CELLS) for latent in z]).to(z.device)
        spec = self.spec.autoencoder
        z = z / spec.scale_factor
        if spec.latents_std:
            z = z * self.per_channel(spec.latents_std) + self.per_channel(spec.latents_mean)
        return (self.compiled_decoder or self.autoencoder.decode)(z).float()

    def normalised(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) with mean 0 and standard deviation 1 in each channel, where these are known."""
        spec = self.spec.autoencoder
        if not spec.latents_std:
            return z
        return (z - self.per_channel(spec.latents_mean)) / self.per_channel(spec.latents_std)

    def per_channel(self, numbers: Sequence[float]) -> Tensor:
        """(C, 1, 1)."""
        return upload(torch.tensor(numbers), self.device)[:, None, None]

    def decodes_in_tiles(self, h: int, w: int) -> bool:
        """Whether decode() cuts latents of h x w cells into tiles."""
        return h * w * self.spec.autoencoder.factor**2 > MAX_WHOLE_PIXELS

    def encode_tiles(self, x: Tensor, tile: int) -> Tensor:
        """encode() in overlapping tiles of `tile` latent cells a side, blended where they overlap.

        x (1, 3, H, W) -> z (1, C, H/f, W/f).
        """
        f = self.spec.autoencoder.factor
        tiles = cut(x.shape[-2] // f, x.shape[-1] // f, tile)
        areas = (tiles.slices(index, f) for index in range(len(tiles.corners)))
        parts = (self.encode(x[..., rows, columns].contiguous()) for rows, columns in areas)
        whole = merge((pixels_last(z[0]) for z in parts), tiles, 1)
        return torch.from_numpy(whole).movedim(-1, 0)[None].to(x.device)

    def decode_tiles(self, z: Tensor, tile: int = DECODING_TILE_CELLS) -> Tensor:
        """decode() in overlapping tiles of `tile` cells a side, blended where they overlap.

        For an image that does not fit in memory whole. The result differs slightly from decode()'s: the
        decoder's norms and attention see one tile at a time. z (1, C, h, w) -> x (1, 3, f*h, f*w), on the
        CPU.
        """
        h, w = z.shape[-2:]
        tiles = cut(h, w, tile)
        areas = (tiles.slices(index) for index in range(len(tiles.corners)))
        parts = (self.decode(z[..., rows, columns].contiguous()) for rows, columns in areas)
        whole = merge((pixels_last(x[0]) for x in parts), tiles, self.spec.autoencoder.factor)
        return torch.from_numpy(whole).movedim(-1, 0)[None]

    def context_pair(self, inputs: ConditioningInput) -> Context | None:
        """The context of each of N conditions; None where the UNet takes no context.

        Conditions are the unconditional and the conditional one, or those of inputs.composition. A model that
        edits images has the unconditional context again as its third row.
        tokens (N, L, C); pooled (N, P) where the UNet takes it, for SDXL with the size embedding appended.
        Both rows are the same for a model that does not support guidance.
        """
        context = self.conditioner.context_pair(inputs) if self.conditioner else None
        if context is not None and self.spec.edits:
            pooled = None if context.pooled is None else context.pooled[[0, 1, 0]]
            context = Context(context.tokens[[0, 1, 0]], pooled)
        if context is None or context.pooled is None or not self.spec.unet_spec.size_width:
            return context
        size = inputs.size or (self.spec.defaults.width, self.spec.defaults.height)
        is_negative = (True, False, True) if self.spec.edits else inputs.is_negative
        scores = (AESTHETIC_SCORES[0 if negative else 1] for negative in is_negative)
        sizes = torch.stack([self.size_embedding(*size, score) for score in scores])  # (N, P)
        return context._replace(pooled=torch.cat([context.pooled.float(), sizes], dim=-1))

    def context_shape(self, inputs: ConditioningInput) -> tuple[int, int] | None:
        """(L, C) of the context of these inputs; None where the UNet takes no context."""
        shape = self.spec.context_shape
        if shape is None:
            return None
        length, count = shape[0], 0 if inputs.neighbours is None else len(inputs.neighbours)
        if inputs.prompt_options.chunked and self.spec.reads_prompts:
            assert isinstance(self.conditioner, (TextConditioner, TokenConditioner))
            length *= self.conditioner.chunk_count(inputs)
        return length + count, shape[1]

    def size_embedding(self, width: int, height: int, score: float = AESTHETIC_SCORES[1]) -> Tensor:
        """SDXL's size conditioning (Podell et al. 2023, section 2.2): (P,).

        Original size, crop offset 0 and target size, each number embedded like a timestep. The refiner takes
        an aesthetic score instead of the target size.
        """
        last = [score] if self.spec.aesthetic_score else [height, width]
        numbers = upload(torch.tensor([height, width, 0, 0, *last]), self.device)
        return timestep_embedding(numbers, self.spec.unet_spec.size_width).flatten()

    def concat_channels(
        self,
        h: int,
        w: int,
        regions: Tensor | None = None,
        masked: MaskedImage | None = None,
        edited: Tensor | None = None,
    ) -> Tensor | None:
        """The concat channels of an image of h x w latent cells; None where the UNet takes none.

        regions: a segmentation map with one cell for spec.label_cell x spec.label_cell pixels; labels count
        from 1, 0 is no label. masked: the image to inpaint; None: the whole image is repainted. edited: the
        image to edit (C, h, w), from self.encode_edited(); None: none.
        -> (N, channels, h, w) float32: unconditional, conditional, and for edited images without the prompt.
        """
        spec, device = self.spec, self.device
        parts = []
        if spec.mask_channels:
            z, mask = masked or (self.fully_masked_latent(h, w), torch.ones(1, h, w, device=device))
            both = [mask, z] if spec.masking.mask_first else [z, mask]
            parts.append(torch.cat(both).expand(2, -1, -1, -1))
        if spec.layout_channels:
            layout = torch.zeros(2, spec.layout_channels, h, w, device=device)
            if regions is not None:
                assert isinstance(self.conditioner, (TextConditioner, SegmentationConditioner))
                layout[1] = self.conditioner.from_regions(regions)
            parts.append(layout)
        if spec.edits:
            z = torch.zeros(spec.autoencoder.latent_channels, h, w, device=device)
            edited = z if edited is None else edited
            parts.append(torch.stack([z, edited, edited]))
        return torch.cat(parts, dim=1) if parts else None

    def encode_edited(self, x: Tensor) -> Tensor:
        """Image to edit x (1, 3, H, W) in [-1, 1] -> (C, h, w): its latent, unscaled but for CosXL."""
        z = self.encode(x)[0]
        return z if self.spec.schedule.sigma_range else z / self.spec.autoencoder.scale_factor

    def encode_masked(self, x: Tensor, repaint: Tensor) -> MaskedImage:
        """Image x (1, 3, H, W) in [-1, 1]; repaint (H, W), bool, True where it is repainted."""
        masking, factor = self.spec.masking, self.spec.autoencoder.factor
        mask = repaint.float()[None]  # (1, H, W)
        if masking.nearest:
            mask = interpolate(mask[None], scale_factor=1 / factor, mode="nearest")[0]  # (1, h, w)
        else:
            mask = max_pool2d(mask, factor)  # (1, h, w)
        z = self.encode(torch.where(repaint, masking.masked_pixel, x))[0]  # (C, h, w)
        return MaskedImage(z, masking.unmasked_value + (1 - masking.unmasked_value) * mask)

    def add_noise(self, low: Tensor, noise: Tensor, level: int) -> Tensor:
        """Adds noise of a noise level to a low-resolution image, where the upscaler was trained so.

        Noise conditioning augmentation (Ho et al. 2022, "Cascaded Diffusion Models", section 4). low and
        noise have the same shape, which may be any.
        """
        if not self.upscaling.noise or self._projects_back(level):
            return low
        alpha_bar = Schedule(self.upscaling.noise).alpha_bar[level]
        return float(alpha_bar**0.5) * low + float((1 - alpha_bar) ** 0.5) * noise

    def fully_masked_latent(self, h: int, w: int) -> Tensor:
        """Scaled latent (C, h, w) of an image with every pixel masked; cached for the last few sizes."""
        if (h, w) not in self._masked_latents:
            autoencoder, f = self.spec.autoencoder, self.spec.autoencoder.factor
            x = torch.zeros(1, autoencoder.image_channels, f * h, f * w, device=self.device)
            self._masked_latents[h, w] = self.encode(x + self.spec.masking.masked_pixel)[0]
        return self._masked_latents[h, w]

    def copy(self, dtype: torch.dtype) -> LatentDiffusion:
        """A copy with weights of another dtype. Tokenizers are shared, not copied."""
        conditioner = self.conditioner
        holders = conditioner.encoders if isinstance(conditioner, TextConditioner) else [conditioner]
        tokenizers = [getattr(holder, "tokenizer", None) for holder in holders]
        conditioner = deepcopy(conditioner, {id(tokenizer): tokenizer for tokenizer in tokenizers})
        copied = LatentDiffusion(self.spec, deepcopy(self.unet), deepcopy(self.autoencoder), conditioner)
        return copied.to(dtype=dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet's weights; of a first stage alone, that of the autoencoder's."""
        return self.unet.dtype if self.unet else self.autoencoder.dtype

    def with_unet_dtype(self, dtype: torch.dtype) -> LatentDiffusion:
        """This model with its UNet copied to another dtype; the other networks are shared."""
        unet = deepcopy(self.unet)
        copied = LatentDiffusion(self.spec, unet and unet.to(dtype=dtype), self.autoencoder, self.conditioner)
        copied.tiny_decoder = self.tiny_decoder
        return copied

    def with_autoencoder_dtype(self, dtype: torch.dtype) -> LatentDiffusion:
        """This model with its autoencoder copied to another dtype; the other networks are shared."""
        autoencoder = deepcopy(self.autoencoder).to(dtype=dtype)
        return LatentDiffusion(self.spec, self.unet, autoencoder, self.conditioner)

    def sample(
        self,
        inputs: Sequence[str | ConditioningInput],
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        concat_channels: Sequence[Tensor] | None = None,
        size: tuple[int, int] | None = None,
        image_guidance_scale: float = DEFAULT_IMAGE_GUIDANCE,
        sampler: str = "ddim",
    ) -> Tensor:
        """One image per input, all in one batch.

        inputs: a string is a prompt alone. guidance_scale: must be 1 if the model does not support guidance.
        concat_channels: of each image, from self.concat_channels(), to inpaint, to place objects or to edit
        an image. size: (width, height); None: the model's default. image_guidance_scale: of models that edit.
        sampler: with its usual timesteps, and no eta. -> x (B, 3, H, W), float32.
        """
        full_inputs = [as_input(each) for each in inputs]
        defaults, rows = self.spec.defaults, self.step_rows(guidance_scale, image_guidance_scale)
        shape = self.spec.latent_shape(*(size or (defaults.width, defaults.height)))
        if concat_channels is None and self.spec.concat_channels:
            made = (self.concat_channels(shape[1], shape[2], each.regions) for each in full_inputs)
            concat_channels = [each for each in made if each is not None]
        # (R B, C', h, w), R UNet rows per image
        stacked = None if concat_channels is None else stack_rows(concat_channels, rows.rows)
        contexts = [
            self.context_pair(each if each.size else each._replace(size=size)) for each in full_inputs
        ]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=each) for each in generators]).to(self.device)

        eps = self.predictor(contexts, stacked, guidance_scale, None, rows)
        return self.decode(self.denoise(noise(), steps, eps, sampler, noise))

    def step_rows(
        self, guidance_scale: float, image_guidance_scale: float = DEFAULT_IMAGE_GUIDANCE
    ) -> StepRows:
        """The UNet rows of an image: one alone where the UNet takes the guidance scale as an input."""
        if self.spec.edits:
            return edit_rows(guidance_scale, image_guidance_scale)
        return cfg_rows(1.0 if self.spec.embeds_guidance else guidance_scale)

    def predictor(
        self,
        contexts: Sequence[Context | None],
        concat_channels: Tensor | None,
        guidance_scale: float,
        noise_level: Tensor | None = None,
        rows: StepRows | None = None,
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function (x (B, C, h, w), t (B,), alpha and sigma of x (B, 2)) -> guided eps (B, C, h, w).

        Of B images with these inputs.

        R is the number of UNet rows per image; the first rows of all images come first. contexts: one per
        image, from self.context_pair(); concat_channels: (R B, C', h, w); noise_level: (R B,). rows: from
        self.step_rows(); None: those of the guidance scale.
        """
        denoiser = self.denoiser
        assert denoiser is not None
        rows = rows or self.step_rows(guidance_scale)
        (numbers, weights, _), embedded = rows, None
        if self.spec.embeds_guidance:
            embedded = torch.full((len(contexts),), guidance_scale, device=self.device)
        # All images have a context or none has; the same holds for pooled vectors.
        present = [each for each in contexts if each is not None]
        poolings = [each.pooled for each in present if each.pooled is not None]
        tokens = stack_rows([each.tokens for each in present], numbers) if present else None  # (R B, L, C)
        pooled = stack_rows(poolings, numbers) if poolings else None  # (R B, P)

        def eps(x: Tensor, t: Tensor, alpha_sigma: Tensor) -> Tensor:
            x, t, alpha_sigma = (torch.cat([given] * len(numbers)) for given in (x, t, alpha_sigma))
            out = denoiser(  # (R B, C, h, w)
                x, t, tokens, pooled, concat_channels, alpha_sigma, noise_level, guidance=embedded
            )
            base, *others = out.chunk(len(numbers))
            return guide(base, zip(others, weights, strict=True))

        return eps

    def denoise(
        self,
        x: Tensor,
        steps: int,
        eps: Callable[[Tensor, Tensor, Tensor], Tensor],
        sampler: str = "ddim",
        noise: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """From noise x (B, C, h, w) to a latent of the same shape.

        eps: from self.predictor(). noise: fresh noise like x, for samplers that add some.
        """
        run = plan(self.schedule, sampler, steps)
        state = x[:, None].repeat(1, 1 + run.history, 1, 1, 1)  # (B, 1 + m, C, h, w): x and the history
        for line, adds_noise in zip(torch.from_numpy(run.coeffs).to(x.device), run.needs_noise, strict=True):
            coeffs = line.expand(len(x), -1)
            alpha_sigma = coeffs[:, ALPHA : SIGMA + 1].float()
            fresh = noise() if noise and adds_noise else None
            state = step(state, eps(state[:, 0], coeffs[:, T], alpha_sigma), coeffs, fresh)
        return state[:, 0]

    def upscale(
        self,
        low: Tensor,
        seeds: Sequence[int],
        steps: int,
        noise_level: int = 0,
        inputs: Sequence[str | ConditioningInput] | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Enlarges images f times by DDIM, in overlapping tiles: low (B, 3, h, w) -> x (B, 3, f*h, f*w).

        h and w must be multiples of the UNet's side_multiple. inputs: one per image, for a model that reads
        prompts; None: empty prompts. The result is float32 on the CPU. Raises ValueError if the model is no
        upscaler.
        """
        h, w = low.shape[-2:]
        tiles = cut(h, w, self.spec.tile)
        areas = [tiles.slices(index) for index in range(len(tiles.corners))]
        x: list[Tensor] = []
        concat: list[Tensor] = []
        contexts: list[Context | None] = []
        for image, seed, each in zip(low, seeds, inputs or [""] * len(low), strict=True):
            contexts += [self.context_pair(as_input(each))] * len(areas)
            noise, noised = self.start_upscaling(image, seed, noise_level)
            x += [noise[:, rows, columns] for rows, columns in areas]
            concat += [self.tile_concat_channels(noised[:, rows, columns]) for rows, columns in areas]
        count = row_count(guidance_scale)
        parts: list[NDArray[np.float32]] = []
        for begin in range(0, len(x), UPSCALING_BATCH_TILES):
            part = slice(begin, begin + UPSCALING_BATCH_TILES)
            z, channels = torch.stack(x[part]), torch.stack(concat[part])
            level = self.noise_levels([noise_level] * count * len(z))
            eps = self.predictor(contexts[part], torch.cat([channels] * count), guidance_scale, level)
            z = self.denoise(z, steps, eps)
            decoded = self.decode(self.add_residual_base(z, channels))
            parts += map(pixels_last, self.correct(decoded, channels, noise_level))
        f, n = self.spec.autoencoder.factor, len(areas)
        wholes = [merge(parts[begin : begin + n], tiles, f) for begin in range(0, len(parts), n)]
        return torch.from_numpy(np.stack(wholes)).movedim(-1, 1)

    def start_upscaling(self, low: Tensor, seed: int, noise_level: int) -> tuple[Tensor, Tensor]:
        """The noise (C, h, w) that upscaling starts from, and the image (3, h, w) with noise of its level."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.spec.autoencoder.latent_channels, *low.shape[1:], generator=generator)
        grain = torch.randn(low.shape, generator=generator)
        return upload(noise, low.device), self.add_noise(low, upload(grain, low.device), noise_level)

    def tile_concat_channels(self, noised: Tensor) -> Tensor:
        """Concat channels of a tile, (C', h, w): noised (3, h, w) and, for a residual latent, its base.

        The base is the latent of the tile resampled to the full size.
        """
        if not self.upscaling.residual:
            return noised
        base = self.encode(resample(noised[None].contiguous(), self.spec.autoencoder.factor))[0]
        return torch.cat([noised, base])

    def add_residual_base(self, z: Tensor, concat_channels: Tensor | None) -> Tensor:
        """The latent to decode: z (B, C, h, w), plus its base if the upscaler predicts residuals.

        concat_channels: (B or more, C', h, w), from tile_concat_channels(); required for a residual.
        """
        if self.spec.upscaling is None or not self.spec.upscaling.residual:
            return z
        assert concat_channels is not None
        return z + concat_channels[: len(z), self.spec.autoencoder.image_channels :]

    def correct(self, x: Tensor, concat_channels: Tensor | None, noise_level: int) -> Tensor:
        """Decoded images x (B, 3, f*h, f*w), corrected by the low-resolution images if this upscaler does so.

        concat_channels: (B or more, C', h, w), from tile_concat_channels().
        """
        if self.spec.upscaling is None or not self._projects_back(noise_level):
            return x
        assert concat_channels is not None
        low = concat_channels[: len(x), : self.spec.autoencoder.image_channels]
        return follow_low_resolution(x, low.to(x))

    def _projects_back(self, noise_level: int) -> bool:
        return self.upscaling.back_projection and noise_level == 0

    def noise_levels(self, levels: Sequence[int]) -> Tensor | None:
        """Noise levels as the UNet takes them, (B,); None for a UNet that takes none."""
        if not self.spec.unet_spec.noise_levels:
            return None
        return upload(torch.tensor(levels), self.device)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LatentDiffusion:
        """Move and convert every network in place; returns itself. The autoencoder's dtype may differ."""
        if self.unet:
            self.unet.to(device=device, dtype=dtype)
        if self.conditioner:
            self.conditioner.to(device=device, dtype=dtype)
        safe_dtype = autoencoder_dtype(self.spec.autoencoder, dtype, device or self.device)
        self.autoencoder.to(device=device, dtype=safe_dtype)
        self.denoiser = Denoiser(self.unet, self.schedule) if self.unet else None
        self.compiled_decoder = None
        self._masked_latents.clear()
        return self


class TiledLatentDiffusion(LatentDiffusion):
    """A model with circular padding along some axes, made by LatentDiffusion.tiled()."""

    def __init__(self, model: LatentDiffusion, axes: Axes) -> None:
        unet = tiled(model.unet, axes) if model.unet else None
        super().__init__(model.spec, unet, tiled(model.autoencoder, axes), model.conditioner)
        self.axes = axes

    def decode_tiles(self, z: Tensor, tile: int = DECODING_TILE_CELLS) -> Tensor:
        """Decode the latent extended on each side by cells of the opposite side, then crop the image."""
        larger, f = wrapped(z, tile // 2, self.axes), self.spec.autoencoder.factor
        x = super().decode_tiles(larger, tile)
        top, left = (f * (a - b) // 2 for a, b in zip(larger.shape[-2:], z.shape[-2:], strict=True))
        return x[..., top : x.shape[-2] - top, left : x.shape[-1] - left]


def as_input(value: str | ConditioningInput) -> ConditioningInput:
    """A string is a prompt alone."""
    return ConditioningInput(prompt=value) if isinstance(value, str) else value


def autoencoder_dtype(
    spec: AutoencoderSpec, dtype: torch.dtype | None, device: torch.device | str | None
) -> torch.dtype | None:
    """The autoencoder's dtype in a model of `dtype`.

    Instead of float16, an autoencoder whose activations overflow it gets bfloat16, or float32 on a GPU
    without bfloat16. None stays None.
    """
    if not spec.upcast or dtype != torch.float16:
        return dtype
    cuda = torch.device(device or "cpu").type == "cuda"
    return torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported(False) else torch.float32


def stack_rows(pairs: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """R rows of each of B pairs (2, ...) -> (R B, ...): the first row of every pair, then the second."""
    return torch.stack([pair[list(rows)] for pair in pairs], dim=1).flatten(0, 1)


def pixels_last(x: Tensor) -> NDArray[np.float32]:
    """x (3, H, W) -> (H, W, 3), on the CPU."""
    pixels: NDArray[np.float32] = x.movedim(0, -1).cpu().numpy()
    return pixels


def to_uint8(x: Tensor) -> Tensor:
    """Images in about [-1, 1] -> uint8, 0 to 255, of the same shape."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

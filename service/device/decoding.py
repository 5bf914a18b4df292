"""From latents to pixels: by the VAE decoder, a tiny VAE, or for previews a linear map."""

from __future__ import annotations

from copy import deepcopy
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion, to_uint8
from models.networks.autoencoder import Autoencoder
from models.networks.tiling import tiled
from models.networks.tiny_autoencoder import TinyDecoder
from models.preview import Projection
from models.transfer import download
from service.device.inputs import masked_pixels, pixels_of
from service.device.registry import Registry
from service.device.state import ImageState, JobState
from service.device.torch_errors import translate_oom
from service.device.workspace import Workspace
from service.engine.events import Incident
from service.engine.job import Job
from service.engine.runner import Preview
from service.errors import NonFinite, OutOfMemory


class Decoder:
    """Decodes latents of the registry's models."""

    def __init__(self, registry: Registry[LatentDiffusion], workspace: Workspace) -> None:
        self._registry = registry
        self._workspace = workspace
        # Latent to preview, for as long as the autoencoder is loaded.
        self._projections: WeakKeyDictionary[Autoencoder, Projection] = WeakKeyDictionary()

    def pixels(self, state: JobState, image: ImageState) -> np.ndarray:
        """The decoded image (H, W, 3). Raises NonFinite and OutOfMemory."""
        z = state.bundle.add_residual_base(state.latent_of(image)[None], image.concat)  # (1, C, h, w)
        tiny = self._tiny_decoder(state.job) if state.job.decoder == "tiny" else None
        x = self._decode_tiny(tiny, z) if tiny else self._decode_full(state.bundle, z)
        if not torch.isfinite(x).all():
            raise NonFinite
        return rgb_bytes(state.bundle.correct(x, image.concat, state.job.noise_level))

    def tile_pixels(self, bundle: LatentDiffusion, z: Tensor, concat: Tensor, noise_level: int) -> np.ndarray:
        """A tile by an upscaling model, from its latent (C, h, w). Raises NonFinite and OutOfMemory."""
        x = self._decode_full(bundle, bundle.add_residual_base(z[None], concat))
        if not torch.isfinite(x).all():
            raise NonFinite
        return rgb_bytes(bundle.correct(x, concat, noise_level))

    def preview(self, state: JobState, image: ImageState) -> Preview:
        """What an image looks like at its current step."""
        if image.tiles and image.pixels is not None:  # no tile shows the whole image
            return preview_of(image.pixels)
        z = state.latent_of(image)
        tiny = self._tiny_decoder(state.job)
        if state.job.preview_decoded and not (tiny and state.job.decoder == "tiny"):
            return preview_of(rgb_bytes(self._decode(state.bundle, z[None])))
        with translate_oom():
            return preview_of(rgb_bytes(tiny(z[None])) if tiny else self._projected(state.bundle, z))

    def _projected(self, bundle: LatentDiffusion, z: Tensor) -> np.ndarray:
        """The colours (h, w, 3) of the cells of a latent (C, h, w)."""
        autoencoder = bundle.autoencoder
        if autoencoder not in self._projections:
            # In float32: an overflow in the fit would spoil every preview of the model.
            precise = bundle.with_autoencoder_dtype(torch.float32)
            self._projections[autoencoder] = Projection(precise)
        colours: np.ndarray = self._projections[autoencoder](z).numpy()
        return colours

    def _tiny_decoder(self, job: Job) -> TinyDecoder | None:
        """The tiny VAE's decoder for the job's model, with circular padding if its images repeat."""
        decoder = self._registry[job.model].tiny_decoder
        return tiled(decoder, job.tiling) if decoder and job.tiling != "none" else decoder

    def _decode_tiny(self, decoder: TinyDecoder, z: Tensor) -> Tensor:
        """x (1, 3, H, W) by a tiny VAE; in float32 if it would have non-finite values."""
        with translate_oom():
            x: Tensor = decoder(z.clone())
            if torch.isfinite(x).all() or decoder.dtype == torch.float32:
                return x
            self._workspace.report_incident(Incident("non_finite", "decode"))
            x = deepcopy(decoder).float()(z)
            return x

    def _decode_full(self, bundle: LatentDiffusion, z: Tensor) -> Tensor:
        """x (1, 3, H, W); in float32 if it would have non-finite values."""
        x = self._decode(bundle, z)
        if torch.isfinite(x).all() or bundle.autoencoder.dtype == torch.float32:
            return x
        self._workspace.report_incident(Incident("non_finite", "decode"))
        with translate_oom():
            return self._decode(bundle.with_autoencoder_dtype(torch.float32), z)

    def _decode(self, bundle: LatentDiffusion, z: Tensor) -> Tensor:
        """x (1, 3, H, W); out of memory: in tiles, or with `invariant` as a whole once more."""
        # The clone gives every latent the same alignment: as a row of a batch it may have another.
        try:
            with translate_oom():
                if bundle.decodes_in_tiles(*z.shape[-2:]):  # which no graph can record
                    return bundle.decode(z.clone())
                return self._workspace.graphs.run(bundle.autoencoder, bundle.decode, z.clone())
        except OutOfMemory:
            self._workspace.report_incident(Incident("out_of_memory", "decode"))
        self._workspace.free()  # after the except block: in it, the exception keeps the call's tensors alive
        with translate_oom():
            whole = self._workspace.invariant
            return bundle.decode(z.clone()) if whole else bundle.decode_tiles(z.clone())


def rgb_bytes(x: Tensor) -> np.ndarray:
    """x (1, 3, H, W) -> uint8 (H, W, 3), on the CPU."""
    return download(to_uint8(x[0]).permute(1, 2, 0).contiguous()).numpy()


def preview_of(pixels: np.ndarray) -> Preview:
    """The preview with these pixels (H, W, 3)."""
    return Preview(pixels.shape[1], pixels.shape[0], pixels.tobytes())


def with_kept_pixels(job: Job, pixels: np.ndarray) -> np.ndarray:
    """The image (H, W, 3), in inpainting jobs with the exact pixels of the input image outside the mask."""
    if not (job.mask and job.keeps_pixels):
        return pixels
    return np.where(masked_pixels(job)[:, :, None], pixels, pixels_of(job))

"""From latents to pixels: by the VAE decoder, a tiny VAE, or for previews a linear map."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from models.latent_diffusion import LatentDiffusion, to_uint8
from models.networks.autoencoder import Autoencoder
from models.networks.tiling import tiled
from models.networks.tiny_autoencoder import TinyDecoder
from models.preview import Projection
from models.transfer import download, start_download
from service.device.inputs import masked_pixels, pixels_of
from service.device.registry import Registry
from service.device.state import ImageState, JobState
from service.device.torch_errors import translate_oom
from service.device.workspace import Workspace
from service.engine.events import Incident
from service.engine.job import Job
from service.engine.runner import Preview
from service.errors import NonFinite, OutOfMemory

DECODE_BATCH = 4  # images of one call of the decoder on a GPU, if they fit in memory
MEMORY_SHARE = 0.5  # of the free memory, for a call of the decoder


class QueuedImage(NamedTuple):
    """An image on its way to the CPU. pixels: (H, W, 3) uint8; finite: bool, whether its values were."""

    pixels: Tensor
    finite: Tensor


class Decoder:
    """Decodes latents of the registry's models.

    batch: most images of one call. It is 1 on a CPU and with `invariant`, since the number of images changes
    the last bits of each; on a CPU several would not be faster either.
    """

    def __init__(self, registry: Registry[LatentDiffusion], workspace: Workspace) -> None:
        self._registry = registry
        self._workspace = workspace
        self.batch = 1 if workspace.invariant or workspace.device.type == "cpu" else DECODE_BATCH
        self._limits: dict[Hashable, int] = {}  # decoder and size -> images of one call that fit in memory
        # Latent to preview, for as long as the autoencoder is loaded.
        self._projections: WeakKeyDictionary[Autoencoder, Projection] = WeakKeyDictionary()

    def pixels(self, state: JobState, image: ImageState) -> np.ndarray:
        """The decoded image (H, W, 3), which this waits for. Raises NonFinite and OutOfMemory."""
        [queued] = self.queue([state], [image])
        pixels, finite = download(queued.pixels), download(queued.finite)
        return pixels.numpy() if finite else self.pixels_in_float32(state, image)

    def pixels_in_float32(self, state: JobState, image: ImageState) -> np.ndarray:
        """As pixels(), for an image that has NaN or Inf values in the decoder's own type."""
        z, tiny, bundle = latent_to_decode(state, image), self._tiny_for(state), state.bundle
        if (tiny or bundle.autoencoder).dtype == torch.float32:
            raise NonFinite
        self._workspace.report_incident(Incident("non_finite", "decode"))
        with translate_oom():
            if tiny:
                x: Tensor = deepcopy(tiny).float()(z)
            else:
                x = self._decode(bundle.with_autoencoder_dtype(torch.float32), z)
        if not torch.isfinite(x).all():
            raise NonFinite
        return rgb_bytes(bundle.correct(x, image.concat, state.job.noise_level))

    def queue(self, states: Sequence[JobState], images: Sequence[ImageState]) -> list[QueuedImage]:
        """The images, queued on the device; only those made of tiles are waited for. Raises OutOfMemory."""
        queued: list[QueuedImage] = []
        for members in self._batches(states, images):
            own = [images[member] for member in members]
            state = states[members[0]]
            z = torch.cat([latent_to_decode(states[member], images[member]) for member in members])
            tiny = self._tiny_for(state)
            with translate_oom():
                x = tiny(z.clone()) if tiny else self._decode(state.bundle, z)  # (B, 3, H, W)
                finite = start_download(torch.isfinite(x).flatten(1).all(1))
                for number, image in enumerate(own):
                    corrected = state.bundle.correct(
                        x[number : number + 1], image.concat, state.job.noise_level
                    )
                    queued.append(QueuedImage(start_download(rgb(corrected)), finite[number]))
        return queued

    def _batches(self, states: Sequence[JobState], images: Sequence[ImageState]) -> list[list[int]]:
        """The numbers of images that are decoded in one call: of one decoder and size, as many as fit."""
        batches: list[list[int]] = []
        kinds: list[Hashable] = []
        for number, (state, image) in enumerate(zip(states, images, strict=True)):
            kind = (state.bundle, self._tiny_for(state), image.x.shape)
            if (
                batches
                and kinds[-1] == kind
                and len(batches[-1]) < self._limit_of(state.bundle, image.x.shape)
            ):
                batches[-1].append(number)
            else:
                batches.append([number])
                kinds.append(kind)
        return batches

    def _limit_of(self, bundle: LatentDiffusion, shape: Sequence[int]) -> int:
        """The most latents (C, h, w) of one call; 1 before the memory of such a call is known."""
        if bundle.decodes_in_tiles(*shape[-2:]):
            return 1
        return min(self.batch, self._limits.get((id(bundle.autoencoder), *shape), 1))

    def forget_measurements(self) -> None:
        """Measure every kind of call again: the free memory has changed."""
        self._limits.clear()

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

    def _tiny_for(self, state: JobState) -> TinyDecoder | None:
        """The tiny VAE's decoder if the job's images are decoded with it."""
        return self._tiny_decoder(state.job) if state.job.decoder == "tiny" else None

    def _tiny_decoder(self, job: Job) -> TinyDecoder | None:
        """The tiny VAE's decoder for the job's model, with circular padding if its images repeat."""
        decoder = self._registry[job.model].tiny_decoder
        return tiled(decoder, job.tiling) if decoder and job.tiling != "none" else decoder

    def _decode_full(self, bundle: LatentDiffusion, z: Tensor) -> Tensor:
        """x (1, 3, H, W); in float32 if it would have non-finite values."""
        x = self._decode(bundle, z)
        if torch.isfinite(x).all() or bundle.autoencoder.dtype == torch.float32:
            return x
        self._workspace.report_incident(Incident("non_finite", "decode"))
        with translate_oom():
            return self._decode(bundle.with_autoencoder_dtype(torch.float32), z)

    def _decode(self, bundle: LatentDiffusion, z: Tensor) -> Tensor:
        """x (B, 3, H, W); out of memory: one image in tiles, or with `invariant` as a whole once more."""
        # The clone gives every latent the same alignment: as a row of a batch it may have another.
        try:
            with translate_oom():
                if bundle.decodes_in_tiles(*z.shape[-2:]):  # which no graph can record
                    return bundle.decode(z.clone())
                return self._measured(bundle, z.clone())
        except OutOfMemory:
            self._workspace.report_incident(Incident("out_of_memory", "decode"))
            if len(z) > 1:
                self._limits[id(bundle.autoencoder), *z.shape[1:]] = 1
                raise
        self._workspace.free()  # after the except block: in it, the exception keeps the call's tensors alive
        with translate_oom():
            whole = self._workspace.invariant
            return bundle.decode(z.clone()) if whole else bundle.decode_tiles(z.clone())

    def _measured(self, bundle: LatentDiffusion, z: Tensor) -> Tensor:
        """x (B, 3, H, W). The first call of a kind shows how many images fit in memory."""
        workspace, kind = self._workspace, (id(bundle.autoencoder), *z.shape[1:])
        measuring = self.batch > 1 and kind not in self._limits and workspace.memory.begin()
        with workspace.graphs.paused() if measuring else nullcontext():
            x = workspace.graphs.run(bundle.autoencoder, bundle.decode, z)
        if measuring:
            use = workspace.memory.end(len(z), 0, workspace.graphs.size)
            self._limits[kind] = max(1, int(MEMORY_SHARE * use.room * len(z) / max(use.peak, 1)))
        return x


def latent_to_decode(state: JobState, image: ImageState) -> Tensor:
    """(1, C, h, w)."""
    return state.bundle.add_residual_base(state.latent_of(image)[None], image.concat)


def rgb(x: Tensor) -> Tensor:
    """x (1, 3, H, W) -> uint8 (H, W, 3), on its device."""
    return to_uint8(x[0]).permute(1, 2, 0).contiguous()


def rgb_bytes(x: Tensor) -> np.ndarray:
    """x (1, 3, H, W) -> uint8 (H, W, 3), on the CPU."""
    return download(rgb(x)).numpy()


def preview_of(pixels: np.ndarray) -> Preview:
    """The preview with these pixels (H, W, 3)."""
    return Preview(pixels.shape[1], pixels.shape[0], pixels.tobytes())


def with_kept_pixels(job: Job, pixels: np.ndarray) -> np.ndarray:
    """The image (H, W, 3), in inpainting jobs with the exact pixels of the input image outside the mask."""
    if not (job.mask and job.keeps_pixels):
        return pixels
    return np.where(masked_pixels(job)[:, :, None], pixels, pixels_of(job))

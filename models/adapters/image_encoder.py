"""CLIP's image encoder: what IP-Adapters and retrieval-augmented models see of a reference image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.adapter_specs import VisionSpec
from models.checkpoint.meta import shapes_only
from models.checkpoint.parts import load_part, native_part
from models.checkpoint.weights import TEXT_FILES, Weights, open_network, open_weights
from models.errors import CheckpointError
from models.formats import ip_files
from models.formats.config_files import read_json
from models.formats.diffusers_read import translated
from models.formats.structure import checked_structure
from models.networks.clip_vision import VisionTransformer
from models.networks.modules import weight_bytes

# Mean and standard deviation of each channel of CLIP's training images, in [0, 1].
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
UNUSED = ("text_model.", "text_projection.", "logit_scale")  # of a complete CLIP
POSITIONS = "embeddings.position_ids"


@dataclass(frozen=True)
class ImageEncoder:
    """CLIP's image encoder, ready to run."""

    network: VisionTransformer

    @property
    def spec(self) -> VisionSpec:
        return self.network.spec

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return weight_bytes(self.network)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> projected vectors (B, P), and (B, n, C) before the last layer."""
        projected, states = self.network(normalised(images, self.spec.image_size))
        return projected, states

    def neighbours(self, images: Tensor) -> Tensor:
        """Images (k, 3, H, W) in [0, 1] -> vectors (k, P) for ConditioningInput.neighbours."""
        return self.encode(images)[0]

    def encode_nothing(self) -> tuple[Tensor, Tensor]:
        """Of an image without content: zeros, and the states of an image of the mean colour."""
        size, weight = self.spec.image_size, self.network.visual_projection.weight
        projected, states = self.network(weight.new_zeros(1, 3, size, size))
        return torch.zeros_like(projected), states


def normalised(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, size, size): their centre square as CLIP was trained on it.

    Pillow scales the shorter side to `size` by bicubic interpolation of 8-bit pixels, as published.
    """
    pixels = (images.float().clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
    squares = torch.from_numpy(np.stack([centre_square(each, size) for each in pixels]))
    x = squares.movedim(-1, 1).to(images.device) / 255
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
    return (x - mean) / std


def centre_square(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """pixels (H, W, 3) -> (size, size, 3)."""
    short = min(pixels.shape[:2])
    height, width = (int(size * side / short) for side in pixels.shape[:2])
    scaled = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def open_image_encoder(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> ImageEncoder:
    """The image encoder in a folder or single file with the names of `transformers`.

    It may be a complete CLIP, whose text encoder is ignored. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        config = path / "config.json"
        spec = translated(config, ip_files.vision_spec, read_json(config))
        tensors = without_prefix(open_network(path, TEXT_FILES, device, allow_pickle), path)
    else:
        tensors = without_prefix(open_weights(path, device, allow_pickle), path)
        with checked_structure(f"the image encoder {path}"):
            spec = ip_files.vision_spec_of_tensors(tensors.shapes)
    with checked_structure(f"the image encoder {path}"), shapes_only():
        network = VisionTransformer(spec)
    load_part(native_part(network, tensors), f"the image encoder {path}", dtype, device)
    return ImageEncoder(network)


def without_prefix(tensors: Weights, path: Path) -> Weights:
    """The image encoder's tensors, without their prefix. Raises CheckpointError if there is none."""
    names = {
        key.removeprefix(ip_files.VISION_PREFIX): key for key in tensors.stored if not key.startswith(UNUSED)
    }
    if ip_files.CLASS_EMBEDDING not in names:
        raise CheckpointError(f"{path} is not a CLIP image encoder in the layout of transformers")
    return tensors.renamed({name: key for name, key in names.items() if name != POSITIONS})

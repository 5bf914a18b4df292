"""The shapes of adapters with networks of their own, as frozen dataclasses. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.spec import UNetSpec


@dataclass(frozen=True)
class ControlNetSpec:
    """Shape of a ControlNet (Zhang et al. 2023, section 3.2).

    unet: of the UNet whose input blocks and middle block it copies; it takes z alone, no concat channels.
    """

    unet: UNetSpec
    hint_channels: int = 3  # of the control image
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)  # of the convolutions on the image; each halves its size
    control_types: int = 0  # kinds of control image that one network takes (ControlNet++); 0: one kind
    type_width: int = 256  # of the embedding of each of them
    type_heads: int = 8  # attention heads of the transformer on their embeddings
    type_layers: int = 1
    global_pool: bool = False  # residuals are means over all cells (the shuffle ControlNet)
    bgr: bool = False  # the image's channels are blue, green, red

    @property
    def factor(self) -> int:
        """Pixels of the control image along one side of a latent cell."""
        return 1 << (len(self.hint_widths) - 1)


@dataclass(frozen=True)
class T2IAdapterSpec:
    """Shape of a T2I-Adapter (Mou et al. 2023, section 3.3)."""

    channels: tuple[int, ...]  # of each feature
    halves: tuple[bool, ...]  # which features have half the size of the one before
    res_blocks: int = 2  # for each feature
    image_channels: int = 3
    factor: int = 8  # pixels along one side of a cell of the first feature
    light: bool = False  # narrow residual blocks between 1x1 convolutions

    @property
    def factors(self) -> tuple[int, ...]:
        """Pixels along one side of a cell of each feature."""
        return tuple(self.factor << sum(self.halves[: index + 1]) for index in range(len(self.halves)))


@dataclass(frozen=True)
class VisionSpec:
    """Shape of CLIP's image encoder (Radford et al. 2021, section 2.4)."""

    width: int
    layers: int
    heads: int
    intermediate: int
    image_size: int  # pixels
    patch_size: int
    projection: int  # width of the projected vector of an image
    activation: str = "gelu"

    @property
    def tokens(self) -> int:
        """Vectors of an image: one for each patch, and one for the whole."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class IPAdapterSpec:
    """Shape of an IP-Adapter (Ye et al. 2023).

    kind: "plain" projects the image's vector; "plus" resamples the vectors of its patches; "full" projects
    each of them.
    """

    kind: Literal["plain", "plus", "full"]
    tokens: int  # image tokens
    embedding_width: int  # of what it takes from the image encoder
    context_width: int
    layers: tuple[int, ...]  # widths of the UNet's cross-attention layers, in the order of the file
    width: int = 0  # of the resampler
    depth: int = 0
    heads: int = 0
    intermediate: int = 0

    @property
    def projected(self) -> bool:
        """Whether it takes the image's projected vector, not the states before the last layer."""
        return self.kind == "plain"

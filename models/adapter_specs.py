"""The shapes of adapters with networks of their own, as frozen dataclasses. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

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

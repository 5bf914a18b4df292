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
    type_heads: int = 8  # attention heads of the transformer that mixes them with the latent
    type_layers: int = 1
    global_pool: bool = False  # residuals are means over all cells (the shuffle ControlNet)
    bgr: bool = False  # the image's channels are blue, green, red

    @property
    def factor(self) -> int:
        """Pixels of the control image along one side of a latent cell."""
        return 1 << (len(self.hint_widths) - 1)

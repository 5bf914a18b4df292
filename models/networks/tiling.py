"""Networks whose images repeat without a seam: convolutions pad with the opposite edge.

As AUTOMATIC1111's web UI does it, every padded convolution of a network is changed; explicit padding outside
convolutions, as in the encoder's Downsample, stays zero.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Literal, TypeVar, cast

from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

Axes = Literal["x", "y", "both"]
Network = TypeVar("Network", bound=nn.Module)


class CircularConv2d(nn.Conv2d):
    """A convolution that shares another one's weights and pads with the opposite edge along some axes."""

    def __init__(self, conv: nn.Conv2d, axes: Axes) -> None:
        size, stride = (cast("tuple[int, int]", each) for each in (conv.kernel_size, conv.stride))
        super().__init__(conv.in_channels, conv.out_channels, size, stride, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        y, x = cast("tuple[int, int]", conv.padding)
        self.axes = axes
        self.circular = (0 if axes == "x" else y, 0 if axes == "y" else x)
        self.zero = (y - self.circular[0], x - self.circular[1])

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C_in, h, w) -> (B, C_out, h', w')."""
        rows, columns = self.circular
        wrapped = pad(x, (columns, columns, rows, rows), mode="circular")
        return conv2d(wrapped, self.weight, self.bias, self.stride, self.zero)


def tiled(network: Network, axes: Axes) -> Network:
    """A copy of a network with circular padding, which shares the weights of the network."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copied = deepcopy(network, shared)
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and any(cast("tuple[int, int]", child.padding)):
                setattr(parent, name, CircularConv2d(child, axes))
    return copied


def wrapped(z: Tensor, cells: int, axes: Axes) -> Tensor:
    """z (B, C, h, w) with `cells` cells of the opposite edge on each side along the axes."""
    y, x = (0 if axes == "x" else min(cells, z.shape[-2])), (0 if axes == "y" else min(cells, z.shape[-1]))
    return pad(z, (x, x, y, y), mode="circular")

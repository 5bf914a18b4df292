"""The residual block of the UNet, and what the timestep's embedding adds in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, silu

from models.networks.kernels import conv_add, conv_norm, group_norm
from models.networks.modules import first_norm
from models.networks.stacked import Layers, products


def same(x: Tensor) -> Tensor:
    """No change of size."""
    return x


def halve(x: Tensor) -> Tensor:
    """Half the size: the mean of each 2x2 square of cells."""
    return avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """Twice the size by nearest neighbour."""
    return interpolate(x, scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding between them and a residual connection.

    resize: changes the size, before the first convolution and on the skip connection. scale_shift: the
    embedding scales and shifts the second norm's output, instead of being added to its input.
    """

    def __init__(
        self, width_in: int, width_out: int, embedding_width: int, groups: int, scale_shift: bool = False,
        resize: Callable[[Tensor], Tensor] = same,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, width_in), nn.SiLU(), nn.Conv2d(width_in, width_out, 3, padding=1)
        )
        embedded = 2 * width_out if scale_shift else width_out
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_width, embedded))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, width_out),
            nn.SiLU(),
            nn.Identity(),  # the reference's dropout: it keeps the published key `out_layers.3`
            nn.Conv2d(width_out, width_out, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C_in, h, w), emb (B, C_emb), the output of emb_layers -> (B, C_out, h', w')."""
        conv1, conv2 = cast("nn.Conv2d", self.in_layers[2]), cast("nn.Conv2d", self.out_layers[3])
        norm1, norm2 = first_norm(self.in_layers), first_norm(self.out_layers)
        h = self.resize(group_norm(x, norm1, activate=True))
        if self.scale_shift:
            scale, shift = emb[:, :, None, None].chunk(2, dim=1)
            h = silu(group_norm(conv1(h), norm2) * (1 + scale) + shift)
        else:
            h = conv_norm(h, conv1, norm2, emb)
        return conv_add(h, conv2, self.resize(x), self.skip_connection)


Embeddings = Mapping[nn.Module, Tensor]  # residual block -> the output of its emb_layers


def res_blocks(network: nn.Module) -> list[ResBlock]:
    return [module for module in network.modules() if isinstance(module, ResBlock)]


def embedding_layers(blocks: Iterable[ResBlock]) -> Layers:
    """The linear layer of each block's emb_layers. All of them get the same input."""
    return [cast("nn.Linear", block.emb_layers[1]) for block in blocks]


def embeddings(emb: Tensor, stages: Iterable[nn.Module]) -> Embeddings:
    """The output of the emb_layers of each residual block of the stages, for emb (B, E)."""
    blocks = [block for stage in stages for block in res_blocks(stage)]
    return dict(zip(blocks, products(silu(emb), embedding_layers(blocks)), strict=True))

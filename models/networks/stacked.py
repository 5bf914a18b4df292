"""Linear layers that get the same input, computed as one matrix product on a GPU.

    stack(layers)        once: their weights move next to each other in memory
    products(x, layers)  the outputs of all layers; one product if the weights lie next to each other

Names, shapes and values of the weights stay as they are, and nothing is kept twice. A layer that gets another
weight later, such as a LoRA's, has a product of its own until its layers are stacked again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Layers = Sequence[nn.Linear]
Parameters = Sequence[Tensor | None]


def products(x: Tensor, layers: Layers) -> Sequence[Tensor]:
    """The output (..., C_out) of each layer for the same x (..., C_in)."""
    weights, biases = parameters_of(layers)
    if torch.is_grad_enabled() or not (is_block(weights) and is_block(biases)):
        return [layer(x) for layer in layers]
    widths = [layer.out_features for layer in layers]
    weight = whole(weights)
    assert weight is not None
    out: Sequence[Tensor] = linear(x, weight, whole(biases)).split(widths, dim=-1)
    return out


def stack(layers: Layers) -> None:
    """Move the weights of layers of equal inputs to one block of memory, and their biases to another."""
    for parameters in parameters_of(layers):
        if not is_block(parameters):
            make_block(parameters)


def stack_like(layers: Layers, base: Layers) -> None:
    """Stack the layers if those of `base` are stacked and share no weight with them.

    Weights and biases are treated separately. A weight that is shared must stay in the memory of `base`.
    """
    for parameters, originals in zip(parameters_of(layers), parameters_of(base), strict=True):
        shared = any(one is other for one, other in zip(parameters, originals, strict=True))
        if is_block(originals) and not shared:
            make_block(parameters)


def parameters_of(layers: Layers) -> tuple[Parameters, Parameters]:
    """The weights and the biases."""
    return [layer.weight for layer in layers], [layer.bias for layer in layers]


def is_block(parameters: Parameters) -> bool:
    """Whether the parameters fill a block of memory, one after the other; or there are none."""
    present = [parameter for parameter in parameters if parameter is not None]
    if len(present) < len(parameters):
        return not present
    block, end = present[0].untyped_storage(), 0
    # The quickest test first: layers that are not stacked usually fail it.
    if block.nbytes() != sum(parameter.nbytes for parameter in present):
        return False
    for parameter in present:
        if parameter.storage_offset() != end or parameter.untyped_storage().data_ptr() != block.data_ptr():
            return False
        end += parameter.numel()
    return True


def make_block(parameters: Parameters) -> None:
    tensors = [parameter.data for parameter in parameters if parameter is not None]
    for parameter, part in zip(parameters, torch.cat(tensors).split(list(map(len, tensors))), strict=True):
        assert parameter is not None
        parameter.data = part


def whole(parameters: Parameters) -> Tensor | None:
    """The parameters of a block as one tensor."""
    first = parameters[0]
    if first is None:
        return None
    length = sum(len(parameter) for parameter in parameters if parameter is not None)
    return first.as_strided((length, *first.shape[1:]), first.stride())

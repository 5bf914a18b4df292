"""Linear layers of one input as one product: the same values, names and memory, whatever happens to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.adapters.lora import sharing
from models.networks.stacked import is_block, parameters_of, products, stack
from models.networks.unet import UNet, shared_inputs, stack_layers, stack_layers_like
from tests.checkpoints.tiny import fill_randomly, tiny_spec
from tests.helpers.numbers import relative_error

WIDTHS = (4, 6, 4)


@pytest.fixture
def layers():
    made = [nn.Linear(8, width).requires_grad_(False) for width in WIDTHS]
    for seed, layer in enumerate(made):
        fill_randomly(layer, seed)
    return made


@pytest.fixture(scope="module")
def unet():
    network = UNet(tiny_spec().unet).requires_grad_(False)
    fill_randomly(network, 1)
    return network


def are_stacked(layers):
    return all(is_block(parameters) for parameters in parameters_of(layers))


def replaced(network, names):
    """A copy with other weights of these names, as a LoRA makes it."""
    weights = [network.get_parameter(name) for name in names]
    changed = {id(weight): nn.Parameter(weight + 1, requires_grad=False) for weight in weights}
    return sharing(network, changed)


@torch.inference_mode()
def test_one_product_gives_the_output_of_each_layer(layers):
    x = torch.randn(2, 3, 8)
    apart = [layer(x) for layer in layers]
    stack(layers)
    assert are_stacked(layers)
    for one, other in zip(products(x, layers), apart, strict=True):
        assert relative_error(one, other) < 1e-6


def test_layers_in_a_block_keep_their_values_and_take_no_more_memory(layers):
    before = [layer.weight.clone() for layer in layers]
    stack(layers)
    blocks = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert len(blocks) == 1
    assert layers[0].weight.untyped_storage().nbytes() == sum(weight.nbytes for weight in before)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


@pytest.mark.parametrize("part", [slice(0, 2), slice(1, 3), slice(None, None, -1)])
@torch.inference_mode()
def test_a_part_of_a_block_has_products_of_its_own(layers, part):
    stack(layers)
    assert not are_stacked(layers[part])
    x = torch.randn(3, 8)
    assert all(
        torch.equal(y, each(x)) for y, each in zip(products(x, layers[part]), layers[part], strict=True)
    )


@torch.inference_mode()
def test_a_layer_that_gets_another_weight_is_computed_with_it(layers):
    stack(layers)
    layers[1].weight = nn.Parameter(torch.full((6, 8), 2.0), requires_grad=False)
    x = torch.ones(1, 8)
    assert torch.equal(products(x, layers)[1], layers[1](x))


def test_gradients_reach_every_layer(layers):
    stack(layers)
    for layer in layers:
        layer.requires_grad_()
    sum(y.sum() for y in products(torch.ones(1, 8), layers)).backward()
    assert all(layer.weight.grad is not None for layer in layers)


@torch.inference_mode()
def test_a_stacked_unet_predicts_the_same(unet):
    stacked = copy.deepcopy(unet)
    stack_layers(stacked)
    assert all(map(are_stacked, shared_inputs(stacked)))
    assert stacked.state_dict().keys() == unet.state_dict().keys()
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, unet.spec.context_width)
    t = torch.tensor([5, 700])
    assert relative_error(stacked(x, t, context), unet(x, t, context)) < 1e-6


@torch.inference_mode()
def test_a_copy_with_some_other_weights_stacks_only_what_is_all_new(unet):
    base = copy.deepcopy(unet)
    stack_layers(base)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    block = "middle_block.1.transformer_blocks.0."
    names = [f"{block}attn1.to_{kind}.weight" for kind in "qkv"] + [f"{block}attn2.to_k.weight"]
    changed = replaced(base, names)
    stack_layers_like(changed, base)
    own = changed.middle_block[1].transformer_blocks[0]
    assert are_stacked((own.attn1.to_q, own.attn1.to_k, own.attn1.to_v))
    assert not are_stacked((own.attn2.to_k, own.attn2.to_v))
    assert all(map(are_stacked, shared_inputs(base)))
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, base.spec.context_width)
    t = torch.tensor([5, 700])
    expected = replaced(unet, names)(x, t, context)
    assert relative_error(changed(x, t, context), expected) < 1e-6

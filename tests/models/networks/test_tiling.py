"""Circular padding: moving the input around the edge moves the output, to rounding."""

from __future__ import annotations

import pytest
import torch

from models.networks.tiling import tiled
from tests.checkpoints.tiny import tiny_model

LATENT = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
X, Y = 3, 2


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def shift_error(function, z: torch.Tensor, cells: int, axis: int, factor: int) -> float:
    """How much shifting the input by `cells` and shifting the output by factor * cells differ."""
    out = function(z)
    shifted = function(z.roll(cells, axis))
    return ((shifted - out.roll(factor * cells, axis)).abs().max() / out.abs().max()).item()


@torch.inference_mode()
@pytest.mark.parametrize(("axes", "moves"), [("both", {X, Y}), ("x", {X}), ("y", {Y})])
def test_a_shift_around_the_edge_shifts_the_prediction_and_the_image(model, axes, moves):
    own = model.tiled(axes)
    context, t = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([500.0])
    for axis in (X, Y):
        eps = shift_error(lambda x: own.unet(x, t, context), LATENT, 2, axis, 1)
        image = shift_error(own.decode, LATENT, 1, axis, 8)
        if axis in moves:
            assert max(eps, image) < 1e-4
        else:
            assert min(eps, image) > 1e-3


@torch.inference_mode()
def test_it_is_torchs_circular_padding(model):
    own, theirs = tiled(model.unet, "both"), tiny_model().unet
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"
    context, t = torch.randn(1, 77, 32), torch.tensor([500.0])
    assert torch.allclose(own(LATENT, t, context), theirs(LATENT, t, context), atol=1e-5)


@torch.inference_mode()
def test_weights_are_shared_and_the_network_itself_does_not_change(model):
    before = model.decode(LATENT)
    own = model.tiled("both")
    assert own is model.tiled("both")
    assert {id(each) for each in own.unet.parameters()} == {id(each) for each in model.unet.parameters()}
    assert own.unet.state_dict().keys() == model.unet.state_dict().keys()
    assert torch.equal(model.decode(LATENT), before)
    assert not torch.allclose(own.decode(LATENT), before, atol=1e-3)


@torch.inference_mode()
def test_an_image_decoded_in_tiles_has_no_seam_at_its_edges(model):
    z = torch.randn(1, 4, 48, 40, generator=torch.Generator().manual_seed(2))
    own = model.tiled("both")
    parts, whole = own.decode_tiles(z, tile=16), own.decode(z)
    assert parts.shape == whole.shape
    edge = (parts - whole).abs()[..., [0, -1], :].mean()
    assert edge <= 1.5 * (parts - whole).abs().mean()

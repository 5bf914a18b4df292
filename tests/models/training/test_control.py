"""The ControlNet for outlines: its data, its start, and the measure of what fills an outline."""

from dataclasses import replace

import numpy as np
import torch

from models.networks.control_net import ControlNet
from models.networks.unet import UNet
from models.training.control import ControlledUNet, batches, control_spec, outlines, start_from
from models.training.evaluate_control import filled, mask_overlap, object_of
from tests.checkpoints.tiny import fill_randomly, tiny_spec
from tests.helpers.numbers import relative_error


def square(side: int = 8, low: int = 2, high: int = 6) -> torch.Tensor:
    """A mask (side, side), true in a square of pixels from low to high - 1."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[low:high, low:high] = True
    return mask


def test_an_outline_covers_the_pixels_on_both_sides_of_a_border() -> None:
    (image,) = outlines(square()[None])
    assert image.shape == (3, 8, 8)
    expected = square(8, 1, 7).float() - square(8, 3, 5).float()
    assert torch.equal(image, expected.expand(3, -1, -1))


def test_batches_have_outlines_and_silhouettes_and_some_empty_captions() -> None:
    data = {
        "latents": torch.ones(4, 2, 4, 4, dtype=torch.bfloat16),
        "masks": square(24, 4, 20)[None].repeat(4, 1, 1),
        "ids": torch.tensor([[[1, 2], [1, 3]]]).repeat(4, 1, 1),
    }
    batch = next(batches(data, torch.tensor([[1, 0]]), 200, seed=0))
    assert batch.images.shape == (200, 3, 24, 24)
    assert 0.1 < (batch.images[:, 0, 12, 12] == 1).float().mean() < 0.4  # silhouettes
    shares = [(batch.ids[:, 1] == token).float().mean() for token in (0, 2, 3)]
    assert shares[0] > 0.1
    assert shares[1] > shares[2] > 0.1


@torch.inference_mode()
def test_a_new_control_net_begins_like_the_encoder_and_changes_nothing() -> None:
    spec = replace(tiny_spec().unet, in_channels=7, middle_res_blocks=2)
    unet, control = UNet(spec), ControlNet(replace(control_spec(spec, 4), hint_widths=(8, 8, 8, 8)))
    fill_randomly(unet, 1)
    fill_randomly(control, 2)
    constant = torch.randn(1, 3, 1, 1).expand(1, 3, 8, 8)
    start_from(control, unet, constant)
    z, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 3, spec.context_width)
    x = torch.cat([z, constant.expand(2, -1, -1, -1)], dim=1)
    hint = control.embed_hint(torch.rand(1, 3, 64, 64))
    assert torch.equal(ControlledUNet(unet, control, hint)(x, t, context), unet(x, t, context))
    inner = slice(1, -1)  # zero padding changes what the constant channels add at the border
    first, copied = unet.input_blocks[0][0](x), control.input_blocks[0][0](z)
    assert relative_error(copied[..., inner, inner], first[..., inner, inner]) < 0.2
    assert torch.equal(control.middle_block[0].in_layers[2].weight, unet.middle_block[0].in_layers[2].weight)


def test_holes_belong_to_an_object() -> None:
    ring = (square(8, 1, 7) & ~square(8, 3, 5)).numpy()
    assert np.array_equal(filled(ring), square(8, 1, 7).numpy())
    image = np.where(ring[..., None], np.uint8(250), np.uint8(20)).repeat(3, -1)
    assert np.array_equal(object_of(image), square(8, 1, 7).numpy())
    assert mask_overlap(filled(ring), square().numpy()) == 16 / 36

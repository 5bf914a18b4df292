"""The autoencoder's training: more latent channels for a trained one."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.networks.autoencoder import Autoencoder
from models.training import first_stage, presets

NARROW = replace(presets.AUTOENCODER, channels=(32, 32), latent_channels=3)


def pair(channels: int) -> tuple[Autoencoder, Autoencoder, torch.Tensor]:
    """An autoencoder, a wider one that starts from it, and images."""
    old, new = Autoencoder(NARROW), Autoencoder(replace(NARROW, latent_channels=channels))
    first_stage.widen(new, old)
    return old, new, torch.rand(2, 3, 32, 32) * 2 - 1


@torch.no_grad()
def test_a_wider_autoencoder_starts_as_the_one_it_came_from() -> None:
    old, new, x = pair(5)
    mean, logvar = new.moments(x)
    for wide, narrow in zip((mean, logvar), old.moments(x), strict=True):
        assert torch.allclose(wide[:, :3], narrow, atol=1e-5)
    assert torch.allclose(new.decode(mean), old.decode(old.encode(x)), atol=1e-5)
    assert mean[:, 3:].std() > 0.01  # new channels already depend on the image, so that they can be trained


def test_all_new_weights_get_gradients_after_one_update() -> None:
    _, new, x = pair(5)
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        first_stage.loss(new, x).backward()
        optimizer.step()
    assert all(weight.grad.abs().sum() > 0 for weight in new.parameters())
    assert new.encoder.conv_out.weight.grad[3:5].abs().sum() > 0


@torch.no_grad()
def test_the_change_counts_the_first_channels_only() -> None:
    old, new, x = pair(5)
    assert first_stage.change(new, old, x) < 1e-10
    new.quant_conv.bias[4] += 1.0
    assert first_stage.change(new, old, x) < 1e-10
    new.quant_conv.bias[0] += 1.0
    assert abs(first_stage.change(new, old, x) - 1 / 3) < 1e-5

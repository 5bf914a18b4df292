"""Images that the autoencoder takes in tiles."""

from __future__ import annotations

import pytest
import torch

from models import latent_diffusion
from tests.checkpoints.tiny import tiny_model


@pytest.mark.parametrize(("h", "w"), [(24, 40), (33, 20)])
def test_a_large_image_is_decoded_and_encoded_in_tiles_without_seams(monkeypatch, h, w):
    bundle, pixels = tiny_model(), h * w * 64
    bundle.decode = bundle.decode
    z = torch.randn(2, 4, h, w, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = bundle.decode(z)
        encoded = bundle.encode(whole)
        monkeypatch.setattr(latent_diffusion, "MAX_WHOLE_PIXELS", pixels - 1)
        monkeypatch.setattr(latent_diffusion, "LARGE_TILE_CELLS", 16)
        tiled, tiled_z = bundle.decode(z), bundle.encode(whole)
    assert tiled.shape == whole.shape
    assert tiled_z.shape == encoded.shape
    assert not torch.equal(tiled, whole)
    # Across the edges of tiles, neighbouring pixels differ no more than elsewhere.
    for axis, others in ((3, (0, 1, 2)), (2, (0, 1, 3))):
        steps, expected = (x.diff(dim=axis).abs().mean(dim=others) for x in (tiled, whole))
        assert (steps / expected).max() < 1.25

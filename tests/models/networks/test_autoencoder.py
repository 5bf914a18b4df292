"""Autoencoders of every published structure, narrow, against `diffusers` on the same random weights."""

import pytest
import torch

from models.networks.autoencoder import Autoencoder
from tests.checkpoints.tiny import fill_randomly
from tests.helpers.numbers import LIMIT, relative_error
from tests.helpers.reference_autoencoder import ROWS, reference


@pytest.fixture(scope="module", params=ROWS)
def pair(request):
    ours = Autoencoder(ROWS[request.param])
    fill_randomly(ours, 1)
    ours.requires_grad_(False).eval()
    return ours, reference(ours.spec, ours.state_dict())


@torch.inference_mode()
def test_encode(pair):
    ours, theirs = pair
    x = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    encoded = theirs.encode(x)
    z = encoded.latents if ours.spec.codes else encoded.latent_dist.mode()
    assert relative_error(ours.encode(x), z) <= LIMIT
    if not ours.spec.codes:
        assert relative_error(ours.moments(x)[1], encoded.latent_dist.logvar) <= LIMIT


@torch.inference_mode()
def test_decode(pair):
    ours, theirs = pair
    z = torch.randn(2, ours.spec.latent_channels, 4, 6, generator=torch.Generator().manual_seed(2))
    x = theirs.decode(z).sample
    assert relative_error(ours.decode(z), x) <= LIMIT


@torch.inference_mode()
def test_decoding_quantises_every_cell_to_its_nearest_code():
    network = Autoencoder(ROWS["vq-f4"])
    fill_randomly(network, 1)
    codes = network.quantize.embedding.weight
    z = codes[torch.arange(24)].T.reshape(1, 3, 4, 6)
    assert torch.equal(network.quantize(z), z)
    assert torch.equal(network.decode(z + 1e-4), network.decode(z))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("kl-f16", "encoder.down.4.attn.1.proj_out.weight"),
        ("vq-f8", "decoder.up.3.attn.2.q.weight"),
        ("vq-f4", "decoder.mid.attn_1.k.weight"),
        ("vq-f4", "quantize.embedding.weight"),
    ],
)
def test_published_keys(name, key):
    with torch.device("meta"):
        assert key in Autoencoder(ROWS[name]).state_dict()
        assert not any("attn" in key for key in Autoencoder(ROWS["vq-f4-noattn"]).state_dict())

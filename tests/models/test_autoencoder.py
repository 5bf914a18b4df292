"""First stages of every published structure, narrow, against `diffusers` on the same random weights."""

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from models.formats import keymaps
from models.networks.autoencoder import Autoencoder
from models.spec import AutoencoderSpec
from tests.tiny import fill_randomly

LIMIT = 3e-5
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def spec(multiples, latent, codes=0, attention=(), middle=True, inner=None) -> AutoencoderSpec:
    return AutoencoderSpec(
        channels=tuple(16 * m for m in multiples), res_blocks=2, latent_channels=latent, scale_factor=1.0,
        groups=8, codes=codes, inner_channels=inner, attention_levels=attention, middle_attention=middle,
    )  # fmt: skip


ROWS = {
    "kl-f4": spec((1, 2, 4), 3),
    "kl-f8": spec((1, 2, 4, 4), 4),
    "kl-f16": spec((1, 1, 2, 2, 4), 16, attention=(4,)),
    "vq-f4": spec((1, 2, 4), 3, codes=512),
    "vq-f4-noattn": spec((1, 2, 4), 3, codes=512, middle=False),
    "vq-f8": spec((1, 2, 2, 4), 4, codes=256, attention=(3,)),
    "vq-f16": spec((1, 1, 2, 2, 4), 8, codes=64, attention=(4,)),
    "inner channels of another number": spec((1, 2), 3, codes=64, inner=6),
}


def table(spec):
    """Native module -> module of `diffusers`."""
    out, last = keymaps.autoencoder(spec) | {"quantize": "quantize"}, len(spec.channels) - 1
    for level in spec.attention_levels:
        for block in range(spec.res_blocks + 1):
            for native, file in ATTENTION.items():
                down = f"encoder.down_blocks.{level}.attentions.{block}.{file}"
                out[f"encoder.down.{level}.attn.{block}.{native}"] = down
                up = f"decoder.up_blocks.{last - level}.attentions.{block}.{file}"
                out[f"decoder.up.{level}.attn.{block}.{native}"] = up
    return out


def reference(spec, tensors):
    """The network of `diffusers` of a shape, with weights of published names."""
    attends = [level in spec.attention_levels for level in range(len(spec.channels))]
    options = {
        "block_out_channels": spec.channels,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in attends[::-1]],
        "layers_per_block": spec.res_blocks,
        "latent_channels": spec.z_channels,
        "norm_num_groups": spec.groups,
        "mid_block_add_attention": spec.middle_attention,
    }
    if spec.codes:
        network = VQModel(num_vq_embeddings=spec.codes, vq_embed_dim=spec.latent_channels, **options)
    else:
        network = AutoencoderKL(**options)
    names = {key: keymaps.rename(key, table(spec)) for key in tensors}
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    weights = {names[key]: value for key, value in tensors.items()}
    network.load_state_dict({key: value.reshape(shapes[key]) for key, value in weights.items()})
    return network.eval()


@pytest.fixture(scope="module", params=ROWS)
def pair(request):
    ours = Autoencoder(ROWS[request.param])
    fill_randomly(ours, 1)
    ours.requires_grad_(False).eval()
    return ours, reference(ours.spec, ours.state_dict())


def error(ours, theirs):
    assert theirs.std() > 0.1  # a constant would agree with anything
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.inference_mode()
def test_encode(pair):
    ours, theirs = pair
    x = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    encoded = theirs.encode(x)
    z = encoded.latents if ours.spec.codes else encoded.latent_dist.mode()
    assert error(ours.encode(x), z) <= LIMIT


@torch.inference_mode()
def test_decode(pair):
    ours, theirs = pair
    z = torch.randn(2, ours.spec.latent_channels, 4, 6, generator=torch.Generator().manual_seed(2))
    x = theirs.decode(z).sample
    assert error(ours.decode(z), x) <= LIMIT


@torch.inference_mode()
def test_decoding_looks_every_cell_up():
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

"""Autoencoders of `diffusers` that load weights by their published (CompVis) names."""

from __future__ import annotations

from diffusers import AutoencoderKL, VQModel

from models.formats import keymaps
from models.spec import AutoencoderSpec

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
    "more inner than latent channels": spec((1, 2), 3, codes=64, inner=6),
}


def table(spec):
    """Our module names -> those of `diffusers`."""
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
    """The autoencoder of `diffusers` of this shape, with these weights under their published names."""
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

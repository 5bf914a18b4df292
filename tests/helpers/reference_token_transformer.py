"""The text transformer of `diffusers`, loading weights by their published (CompVis) names."""

from __future__ import annotations

from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

LAYER = {  # our layers come in pairs: attention, then feed-forward; theirs are one layer
    "0.0": "self_attn_layer_norm",
    "0.1.to_q": "self_attn.q_proj",
    "0.1.to_k": "self_attn.k_proj",
    "0.1.to_v": "self_attn.v_proj",
    "0.1.to_out": "self_attn.out_proj",
    "1.0": "final_layer_norm",
    "1.1.net.0.0": "fc1",
    "1.1.net.2": "fc2",
}
ENDS = {"token_emb": "embed_tokens", "pos_emb.emb": "embed_positions", "norm": "layer_norm"}


def reference(spec, weights):
    """The text transformer of `diffusers` of this shape, with these weights under their published names."""
    config = LDMBertConfig(
        vocab_size=spec.vocabulary, max_position_embeddings=spec.tokens, encoder_layers=spec.layers,
        encoder_ffn_dim=4 * spec.width, d_model=spec.width,
    )  # fmt: skip
    names = dict(ENDS)
    for index in range(spec.layers):
        for ours, theirs in LAYER.items():
            half, rest = ours.split(".", 1)
            names[f"attn_layers.layers.{2 * index + int(half)}.{rest}"] = f"layers.{index}.{theirs}"
    renamed = {}
    for key, value in weights.items():
        module, leaf = key.rsplit(".", 1)
        renamed[f"{names[module]}.{leaf}"] = value
    network = LDMBertModel(config).model.eval()
    network.load_state_dict(renamed)
    return network

"""Key-name tables between the published layouts and ours (the CompVis names). Tables only.

A table maps a native module name to its name in the file; the rest of a key, below the longest module name
that the table holds, is the same in both.
"""

from __future__ import annotations

import re

from models.adapter_specs import ControlNetSpec
from models.spec import AutoencoderSpec, UNetSpec

UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "input_blocks.0.0": "conv_in",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
ADDED = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
HINT = "controlnet_cond_embedding"
CONTROL_NET_ENDS = {
    "input_hint_block.0": f"{HINT}.conv_in",
    "middle_block_out.0": "controlnet_mid_block",
    "types.task_embedding": "task_embedding",
    "types.transformer_layes": "transformer_layes",
    "types.spatial_ch_projs": "spatial_ch_projs",
    "types.control_add_embedding.0": "control_add_embedding.linear_1",
    "types.control_add_embedding.2": "control_add_embedding.linear_2",
}
RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
AUTOENCODER_ENDS = {
    f"{side}.{native}": f"{side}.{file}"
    for side in ("encoder", "decoder")
    for native, file in {
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
        "mid.block_1": "mid_block.resnets.0",
        "mid.block_2": "mid_block.resnets.1",
        "mid.attn_1.norm": "mid_block.attentions.0.group_norm",
        "mid.attn_1.q": "mid_block.attentions.0.to_q",
        "mid.attn_1.k": "mid_block.attentions.0.to_k",
        "mid.attn_1.v": "mid_block.attentions.0.to_v",
        "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
    }.items()
} | {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

# The autoencoder's attention as older folders name it: file name then -> file name now.
OLDER_ATTENTION = {
    f"{side}.mid_block.attentions.0.{old}.{leaf}": f"{side}.mid_block.attentions.0.{new}.{leaf}"
    for side in ("encoder", "decoder")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
    for leaf in ("weight", "bias")
}

# Buffers of older text encoders; they are not learned.
TEXT_IGNORED = frozenset({"embeddings.position_ids"})
TEXT_PREFIX = "text_model."

# Tensors of a single file that are not used to generate images: tables of the schedule, bookkeeping, the
# text transformer's unused last layer, the first stage's training losses.
SCHEDULE_BUFFERS = frozenset(
    (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "lvlb_weights",
        "logvar",
        "scale_factor",
    )
)
LOW_SCALE = "low_scale_model."  # prefix of the same tables for the noise on low-resolution images
SINGLE_IGNORED = (
    SCHEDULE_BUFFERS
    | {LOW_SCALE + key for key in SCHEDULE_BUFFERS}
    | {
        "model_ema.decay",
        "model_ema.num_updates",
        "cond_stage_model.transformer.to_logits.weight",
        "cond_stage_model.transformer.to_logits.bias",
        "denoiser.sigmas",
        "v_pred",
        "ztsnr",
        "edm_mean",
        "edm_std",
        "edm_vpred.sigma_max",
        "edm_vpred.sigma_min",
    }
)
SINGLE_IGNORED_PREFIXES = (
    "loss.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
    "cond_stage_model.loss.",
)
# Tensors of a text encoder in a single file: those for comparisons with images, masks, position ids.
TEXT_UNUSED = re.compile(
    r"(cond_stage_model|conditioner)\.(.*\.)?"
    r"(logit_scale|attn_mask|position_ids|(vision_model|visual|visual_projection)\..*"
    r"|transformer\.(text_model\.)?text_projection(\.weight)?)"
)
# Prefixes of all tensors of networks; tensors with other names are not needed to use a model.
NETWORK_PREFIXES = (
    "model.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "low_scale_model.",
)
EMA = "model_ema."


def is_ignored(key: str) -> bool:
    """Whether a tensor of a single file is not used to generate images."""
    unused = key in SINGLE_IGNORED or key.startswith(SINGLE_IGNORED_PREFIXES)
    return unused or bool(TEXT_UNUSED.fullmatch(key))


def averaged(key: str) -> str:
    """The name of the average of a UNet's parameter, which has no dots."""
    return EMA + key.removeprefix("model.").replace(".", "")


# A text encoder's modules -> OpenCLIP's; then the same for the modules of a layer. OpenCLIP has one tensor
# for q, k and v: its PIECES get names here, with the piece after a dot.
OPEN_CLIP = {
    "transformer.embeddings.token_embedding": "token_embedding",
    "transformer.embeddings.position_embedding.weight": "positional_embedding",
    "transformer.final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    **{
        f"self_attn.{part}_proj.{leaf}": f"attn.in_proj_{leaf}.{part}"
        for part in ("q", "k", "v")
        for leaf in ("weight", "bias")
    },
}
PIECES = {"q": 0, "k": 1, "v": 2}  # thirds of OpenCLIP's tensors for q, k and v

CLIP_IMAGE_PREFIXES = ("vision_model.", "visual_projection.", "logit_scale")  # of a complete CLIP


def rename(key: str, table: dict[str, str]) -> str:
    """A native parameter's name in the file. Raises KeyError if the table has no module that contains it."""
    module = key
    while module and module not in table:
        module = module.rpartition(".")[0]
    return table[module] + key[len(module) :]


def res_block(native: str, file: str) -> dict[str, str]:
    return {f"{native}.{inner}": f"{file}.{name}" for inner, name in RES_BLOCK.items()}


def unet(spec: UNetSpec) -> dict[str, str]:
    """Native module -> file module of a UNet of this shape."""
    table, last = dict(UNET_ENDS), len(spec.channels) - 1
    table |= ADDED if spec.added_width else {}
    for level in range(last + 1):
        down, first = f"down_blocks.{level}", 1 + level * (spec.res_blocks + 1)
        for block in range(spec.res_blocks):
            table |= res_block(f"input_blocks.{first + block}.0", f"{down}.resnets.{block}")
            table[f"input_blocks.{first + block}.1"] = f"{down}.attentions.{block}"
        table[f"input_blocks.{first + spec.res_blocks}.0.op"] = f"{down}.downsamplers.0.conv"

        up, first = f"up_blocks.{last - level}", (last - level) * (spec.res_blocks + 1)
        for block in range(spec.res_blocks + 1):
            table |= res_block(f"output_blocks.{first + block}.0", f"{up}.resnets.{block}")
            table[f"output_blocks.{first + block}.1"] = f"{up}.attentions.{block}"
        # The upsampler comes after the attention, if there is any.
        upsample = 2 if spec.up_depth(level, spec.res_blocks) else 1
        table[f"output_blocks.{first + spec.res_blocks}.{upsample}.conv"] = f"{up}.upsamplers.0.conv"
    if spec.middle_depth:
        table["middle_block.1"] = "mid_block.attentions.0"
    places = (0, 2 if spec.middle_depth else 1)[: spec.middle_res_blocks]
    for number, place in enumerate(places):
        table |= res_block(f"middle_block.{place}", f"mid_block.resnets.{number}")
    return table


def control_net(spec: ControlNetSpec) -> dict[str, str]:
    """Native module -> file module of a ControlNet of this shape."""
    convolutions = 2 * (len(spec.hint_widths) - 1)  # between the first and the last
    return (
        unet(spec.unet)
        | CONTROL_NET_ENDS
        | {f"input_hint_block.{2 * n + 2}": f"{HINT}.blocks.{n}" for n in range(convolutions)}
        | {f"input_hint_block.{2 * convolutions + 2}": f"{HINT}.conv_out"}
        | {f"zero_convs.{n}.0": f"controlnet_down_blocks.{n}" for n in range(input_blocks(spec.unet))}
    )


def input_blocks(spec: UNetSpec) -> int:
    """How many input blocks a UNet has."""
    return len(spec.channels) * (spec.res_blocks + 1)


def autoencoder(spec: AutoencoderSpec) -> dict[str, str]:
    """Native module -> file module of an autoencoder of this shape."""
    table, last = dict(AUTOENCODER_ENDS), len(spec.channels) - 1
    for level in range(last + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{last - level}"
        table[f"encoder.down.{level}.downsample"] = f"{down}.downsamplers.0"
        table[f"decoder.up.{level}.upsample"] = f"{up}.upsamplers.0"
        sides = (
            (f"encoder.down.{level}", down, spec.res_blocks),
            (f"decoder.up.{level}", up, spec.res_blocks + 1),
        )
        for native, file, blocks in sides:
            for block in range(blocks):
                table[f"{native}.block.{block}"] = f"{file}.resnets.{block}"
                table[f"{native}.block.{block}.nin_shortcut"] = f"{file}.resnets.{block}.conv_shortcut"
    return table


def open_clip(layers: int) -> dict[str, str]:
    """Native module -> file module of an OpenCLIP text encoder."""
    return OPEN_CLIP | {
        f"transformer.encoder.layers.{layer}.{native}": f"transformer.resblocks.{layer}.{name}"
        for layer in range(layers)
        for native, name in OPEN_CLIP_LAYER.items()
    }

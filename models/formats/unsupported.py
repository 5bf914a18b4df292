"""Recognises files that are not complete latent diffusion models, so that errors can say what they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from models.errors import CheckpointError
from models.formats import control_files
from models.formats.ldm import CONDITION, FIRST_STAGE, UNET, Shapes
from models.formats.lora_keys import split_key, unsupported_kind

NO_MODEL = "is not supported"
ADAPTER = "is added to a model with {}"
COMPOSE = "ldm convert BASE FOLDER --unet FILE makes a complete model of it"
ENCODER = "is for IP-Adapters: --image-encoder"


class Kind(NamedTuple):
    """A kind of file. patterns: each matches the beginning of the name of one of its tensors."""

    name: str
    patterns: tuple[str, ...]
    reason: str = NO_MODEL


UNET_PREFIX = r"(model\.diffusion_model\.|unet\.|diffusion_model\.|transformer\.|)"
PARAMS = r"(params_ema\.|params\.|)"  # of files by BasicSR
VIDEO = "a video model"
KINDS = (  # the first match counts
    Kind("Chroma", (UNET_PREFIX + r"distilled_guidance_layer\.",)),
    Kind("Hunyuan Video", (UNET_PREFIX + r"txt_in\.individual_token_refiner\.",)),
    Kind("HiDream", (UNET_PREFIX + r"double_stream_blocks\.",)),
    Kind("FLUX", (UNET_PREFIX + r"double_blocks\.", UNET_PREFIX + r"single_blocks\.")),
    Kind("a FLUX-like transformer", (r"(transformer\.|)single_transformer_blocks\.",)),
    Kind("Stable Diffusion 3", (UNET_PREFIX + r"joint_blocks\.",)),
    Kind("Stable Diffusion 3 (key names of diffusers)", (r"context_embedder\.", r"transformer_blocks\.")),
    Kind("Qwen-Image", (UNET_PREFIX + r"transformer_blocks\.0\.img_mod\.",)),
    Kind("LTX-Video", (UNET_PREFIX + r"patchify_proj\.",)),
    Kind("Wan, " + VIDEO, (UNET_PREFIX + r"blocks\.0\.self_attn\.norm_q\.",)),
    Kind("Lumina or Z-Image", (UNET_PREFIX + r"(cap_embedder|x_embedder\.weight|noise_refiner)",)),
    Kind("PixArt", (UNET_PREFIX + r"(adaln_single|t_block)\.",)),
    Kind("Hunyuan-DiT", (UNET_PREFIX + r"(mlp_t5|style_embedder)\.",)),
    Kind("AuraFlow", (UNET_PREFIX + r"double_layers\.",)),
    Kind(
        "Stable Cascade (Würstchen)",
        (UNET_PREFIX + r"(clip_txt_mapper|clip_txt_pooled_mapper|clip_mapper|effnet_mapper)\.",),
    ),
    Kind("Stable Cascade's stage A", (r"(vquantizer|first_stage_model\.vquantizer)\.",)),
    Kind("Kandinsky 2", (UNET_PREFIX + r"(encoder_hid_proj\.image_embeds|add_embedding\.image_proj)",)),
    Kind("Kandinsky 2's MoVQ decoder", (r"decoder\.(conv_norm_out|norm_out)\.norm_layer\.",)),
    Kind("DeepFloyd IF", (UNET_PREFIX + r"(encoder_pooling|aug_proj|add_embedding\.norm1)\.",)),
    Kind("a motion module of AnimateDiff", (r".*motion_modules\.",)),
    Kind("Stable Video Diffusion", (r".*time_stack\.",)),
    Kind(VIDEO, (r".*(temporal_transformer|temp_attentions|temp_convs)\.",)),
    Kind("Stable unCLIP", (r"(embedder\.model\.visual|noise_augmentor)\.",)),
    Kind("Zero-1-to-3", (r"cc_projection\.",)),
    Kind("a model with GLIGEN's layout attention", (UNET_PREFIX + r"(position_net|.*\.fuser)\.",)),
    Kind("Stable Diffusion 2 depth2img", (r"depth_model\.",)),
    Kind("a model in scaled fp8", (r".*\.(scale_weight|weight_scale)$",)),
    Kind("a model in 4 bits (bitsandbytes)", (r".*\.weight\.(absmax|quant_map|quant_state)",)),
    Kind("an IP-Adapter", (r"(image_proj|ip_adapter)\.",), ADAPTER.format("--reference-adapter")),
    Kind("a CLIP image encoder", (r"vision_model\.embeddings\.class_embedding$",), ENCODER),
    Kind(
        "a textual inversion embedding",
        (r"(emb_params|string_to_param|clip_l|clip_g)$",),
        ADAPTER.format("--embedding"),
    ),
    Kind(
        "a tiny autoencoder (TAESD)", (r"(taesd_(en|de)coder\.|)(\d+|(en|de)coder\.layers\.\d+)\.conv\.0\.",)
    ),
    Kind("an upscaler of pixels (ESRGAN)", (PARAMS + r"(model\.0\.|conv_first\.|body\.0\.rdb)",)),
    Kind("an upscaler of pixels (SwinIR)", (PARAMS + r"layers\.0\.residual_group\.",)),
    Kind("a T5 text encoder", (r"(encoder\.block\.0\.layer\.0\.SelfAttention|shared\.weight$)",)),
    Kind("a CLIP text encoder", (r"(text_model\.|)(encoder\.layers\.0\.self_attn|embeddings\.token_emb)",)),
)
# Widths of the context -> the base model of a UNet alone.
BASES = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    2048: "Stable Diffusion XL",
    1280: "SDXL's refiner",
}
LATENT = 4  # channels of the latents of all of them
CONTEXT_KEYS = re.compile(r".*\.attn2\.to_k\.weight")
DIFFUSERS_UNET, BARE_UNET = "time_embedding.linear_1.weight", "input_blocks.0.0.weight"
DIFFUSERS_VAE = "decoder.mid_block.resnets.0.norm1.weight"
BY_CHANNELS = {5: "Stable Diffusion 2 depth2img"}  # by the UNet's input channels


def refuse_other_models(shapes: Shapes, name: str) -> None:
    """Raise CheckpointError for a known kind of file that is not a supported model, naming the kind."""
    if control := control_files.kind_of(shapes):
        raise CheckpointError(
            f"{name} is {control.name}, which {control.refused or ADAPTER.format('--controlnet')}"
        )
    if is_lora(shapes):
        raise CheckpointError(f"{name} is a LoRA, which {ADAPTER.format('--lora')}")
    for kind in KINDS:
        if all(any_matches(pattern, shapes) for pattern in kind.patterns):
            raise CheckpointError(f"{name} is {kind.name}, which {kind.reason}")
    if DIFFUSERS_UNET in shapes or (BARE_UNET in shapes and UNET + "out.2.weight" not in shapes):
        raise CheckpointError(
            f"{name} is a UNet alone{base_of(shapes)}: it contains no text encoder and no VAE; {COMPOSE}"
        )
    if DIFFUSERS_VAE in shapes or (shapes and all(key.startswith(FIRST_STAGE) for key in shapes)):
        raise CheckpointError(f"{name} is a VAE alone: add it to a model with --vae")
    if not is_plain_text_model(shapes):
        return
    into = shapes.get(UNET + "input_blocks.0.0.weight", (0, 0))[1]
    if into in BY_CHANNELS:
        raise CheckpointError(
            f"{name} is {BY_CHANNELS[into]}, whose UNet has {into} input channels; it is not supported"
        )


def is_lora(keys: Collection[str]) -> bool:
    """Whether most tensors have names that LoRA files have."""
    known = sum(bool(split_key(key)[1] or unsupported_kind([key])) for key in keys)
    return 2 * known > len(keys)


def refuse_unet_alone(shapes: Shapes, name: str) -> None:
    """Raise CheckpointError, saying what is missing, for a UNet of Stable Diffusion without text encoder."""
    latent = shapes.get(UNET + "out.2.weight", (0,))[0]
    if latent != LATENT or any(key.startswith((CONDITION, "conditioner.")) for key in shapes):
        return
    if base := base_of(shapes):
        has_vae = any(key.startswith(FIRST_STAGE) for key in shapes)
        what = "a UNet and a VAE" if has_vae else "a UNet alone"
        missing = "no text encoder" if has_vae else "no text encoder and no VAE"
        raise CheckpointError(f"{name} is {what}{base}: it contains {missing}; {COMPOSE}")


def any_matches(pattern: str, keys: Iterable[str]) -> bool:
    compiled = re.compile(pattern)
    return any(compiled.match(key) for key in keys)


def is_plain_text_model(shapes: Shapes) -> bool:
    """Whether a file has a UNet with a context of text, as Stable Diffusion's."""
    return any(key.startswith(UNET) and CONTEXT_KEYS.fullmatch(key) for key in shapes)


def base_of(shapes: Shapes) -> str:
    """' of Stable Diffusion ...', by the width of the UNet's context; empty if it is of no known model."""
    widths = {shape[1] for key, shape in shapes.items() if CONTEXT_KEYS.fullmatch(key) and len(shape) == 2}
    named = [BASES[width] for width in widths if width in BASES]
    return f" of {named[0]}" if named else ""

"""Writes the configuration files of a diffusers folder from a ModelSpec, in the form that diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path

from models.errors import CheckpointError
from models.formats import edm, ldm_json
from models.formats.config_files import Config
from models.formats.diffusers_read import config_file
from models.formats.diffusers_tables import (
    ADDED_KEY,
    EDITING,
    INDEX_FILE,
    INPAINTING,
    LIBRARIES,
    NOISE_SCHEDULER,
    ONE_ENCODER,
    PIPELINES,
    PLAIN,
    PLAIN_UNET_FIXED,
    SCHEDULER,
    SIZE_KEY,
    SUPER_RESOLUTION,
    TEXT_ENCODERS,
    TEXT_FIXED,
    UNET_FIXED,
    UNUSED_PARTS,
    UPSCALING,
    VAE_FIXED,
    XL,
    XL_EDITING,
    XL_INPAINTING,
    XL_REFINER,
)
from models.spec import AutoencoderSpec, ModelSpec, ScheduleSpec, TextSpec, UNetSpec

DIFFUSERS_VERSION = "0.36.0"


def write_configs(spec: ModelSpec, path: Path) -> None:
    """Write every configuration file of the layout."""
    pipeline = pipeline_of(spec)
    parts = {
        "unet": unet_config(spec) if spec.texts else plain_unet_config(spec),
        "vqvae" if "vqvae" in PIPELINES[pipeline] else "vae": autoencoder_config(
            spec.autoencoder, spec.schedule.sigma_data
        ),
        SCHEDULER: schedule_config(spec.schedule),
    }
    numbered = zip(spec.encoder_numbers, spec.texts, strict=False)
    parts |= {TEXT_ENCODERS[number]: text_config(text) for number, text in numbered}
    if spec.upscaling and spec.upscaling.noise:
        parts[NOISE_SCHEDULER] = schedule_config(spec.upscaling.noise) | {
            "_class_name": noise_class(pipeline)
        }
    files = {config_file(path, part): config for part, config in parts.items()}
    files[path / INDEX_FILE] = index_config(pipeline, spec)
    for file, config in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    ldm_json.write(path, spec)


def pipeline_of(spec: ModelSpec) -> str:
    """The diffusers pipeline that runs such a model."""
    if spec.upscaling:
        return UPSCALING if spec.texts else SUPER_RESOLUTION
    if spec.aesthetic_score:
        return XL_REFINER
    if spec.edits:
        return XL_EDITING if len(spec.texts) > 1 else EDITING
    if len(spec.texts) > 1:
        return XL_INPAINTING if spec.mask_channels else XL
    return INPAINTING if spec.mask_channels else PLAIN


def noise_class(pipeline: str) -> str:
    """The scheduler class for the noise on low-resolution images."""
    return "DDPMScheduler" if pipeline == UPSCALING else "DDIMScheduler"


def index_config(pipeline: str, spec: ModelSpec) -> Config:
    upscaling = spec.upscaling
    parts = {part: LIBRARIES.get(part, "diffusers") for part in PIPELINES[pipeline]}
    index: Config = {
        "_class_name": pipeline,
        "_diffusers_version": DIFFUSERS_VERSION,
        **{part: [library, PIPELINES[pipeline][part]] for part, library in parts.items()},
        SCHEDULER: ["diffusers", schedule_config(spec.schedule)["_class_name"]],
    }
    if upscaling and upscaling.noise:
        index[NOISE_SCHEDULER] = ["diffusers", noise_class(pipeline)]
        index["max_noise_level"] = upscaling.max_noise_level
    if pipeline in (PLAIN, INPAINTING, EDITING):
        index |= {"requires_safety_checker": False}
    if pipeline in (XL, XL_INPAINTING, XL_EDITING, XL_REFINER):
        index |= {"force_zeros_for_empty_prompt": spec.zero_null}
    if pipeline == XL_EDITING:
        index |= {"is_cosxl_edit": bool(spec.schedule.sigma_range)}
    if pipeline == XL_REFINER:
        index |= {"requires_aesthetics_score": True}
    return index | {part: [None, None] for part in UNUSED_PARTS[pipeline]}


def sample_size(spec: ModelSpec) -> int | list[int]:
    """Latent size that the UNet was trained at, (rows, columns): one number if both are equal, since some
    pipelines compare it with a number."""
    sides = [side // spec.autoencoder.factor for side in (spec.defaults.height, spec.defaults.width)]
    return sides[0] if sides[0] == sides[1] else sides


def denoiser(spec: ModelSpec) -> UNetSpec:
    """The spec of the UNet. Raises CheckpointError for a first stage alone."""
    if spec.unet is None:
        raise CheckpointError("the diffusers layout does not support a first stage alone")
    return spec.unet


def plain_unet_config(spec: ModelSpec) -> Config:
    """For a UNet without a context. Raises CheckpointError if it has attention."""
    unet = denoiser(spec)
    if unet.middle_depth or any(unet.transformer_depth):
        raise CheckpointError("the diffusers layout does not support a UNet with attention but no context")
    levels = len(unet.channels)
    config = {option: accepted[0] for option, accepted in PLAIN_UNET_FIXED.items()} | {
        "_class_name": "UNet2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "sample_size": sample_size(spec),
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": list(unet.channels),
        "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels,
        "layers_per_block": unet.res_blocks,
        "norm_num_groups": unet.groups,
    }
    return config | ({"num_class_embeds": unet.noise_levels} if unet.noise_levels else {})


MIDDLES = (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn")  # by the number of residual blocks


def unet_config(spec: ModelSpec) -> Config:
    """Raises CheckpointError for a middle block that the layout cannot describe."""
    return unet_options(denoiser(spec)) | {"sample_size": sample_size(spec)}


def unet_options(unet: UNetSpec) -> Config:
    """The same without the size of the latents."""
    full = unet.middle_res_blocks == len(MIDDLES) - 1
    if full and (not unet.middle_depth or unet.transformer_depth[-1] not in (0, unet.middle_depth)):
        raise CheckpointError(
            "the diffusers layout needs a middle block whose transformer is as deep as the last level's"
        )
    depth = [d or unet.middle_depth or 1 for d in unet.transformer_depth]
    up_depths = [list(depths) if any(depths) else 1 for depths in reversed(unet.up_depths)]
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in unet.transformer_depth]
    up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(unet.transformer_depth)]
    return (
        {option: accepted[0] for option, accepted in UNET_FIXED.items()}
        | {
            "_class_name": ONE_ENCODER["unet"],
            "_diffusers_version": DIFFUSERS_VERSION,
            "in_channels": unet.in_channels,
            "out_channels": unet.out_channels,
            "block_out_channels": list(unet.channels),
            "down_block_types": down,
            "up_block_types": up,
            "layers_per_block": unet.res_blocks,
            "transformer_layers_per_block": depth,
            "reverse_transformer_layers_per_block": up_depths or None,
            "mid_block_type": MIDDLES[unet.middle_res_blocks],
            "attention_head_dim": list(unet.heads),
            "cross_attention_dim": unet.context_width,
            "norm_num_groups": unet.groups,
            "use_linear_projection": unet.linear_projection,
            "only_cross_attention": list(unet.cross_only) or False,
            "num_class_embeds": unet.noise_levels or None,
            "time_cond_proj_dim": unet.guidance_width or None,
        }
        | (
            {"addition_embed_type": "text_time", ADDED_KEY: unet.added_width, SIZE_KEY: unet.size_width}
            if unet.added_width
            else {}
        )
    )


def autoencoder_config(spec: AutoencoderSpec, sigma_data: float = 1.0) -> Config:
    levels = len(spec.channels)
    # The class has no patches in diffusers; the option is named as in its autoencoders that have them.
    patches = {"patch_size": spec.patch_size} if spec.patch_size > 1 else {}
    return (
        {option: accepted[0] for option, accepted in VAE_FIXED.items()}
        | patches
        | {
            "_class_name": ONE_ENCODER["vae"],
            "_diffusers_version": DIFFUSERS_VERSION,
            "in_channels": spec.image_channels,
            "out_channels": spec.image_channels,
            "block_out_channels": list(spec.channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": spec.res_blocks,
            "latent_channels": spec.latent_channels,
            "norm_num_groups": spec.groups,
            "sample_size": spec.sample_size,
            "scaling_factor": spec.scale_factor * sigma_data,
            "mid_block_add_attention": spec.middle_attention,
            "force_upcast": spec.upcast,
            "latents_mean": list(spec.latents_mean) or None,
            "latents_std": list(spec.latents_std) or None,
        }
    )


def text_config(spec: TextSpec) -> Config:
    return {
        "architectures": ["CLIPTextModelWithProjection" if spec.pooled else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.intermediate,
        "max_position_embeddings": spec.tokens,
        "projection_dim": spec.pooled or spec.width,
        "hidden_act": spec.activation,
        "layer_norm_eps": TEXT_FIXED["layer_norm_eps"][0],
        "bos_token_id": spec.bos_id,
        "eos_token_id": spec.eos_id,
        "pad_token_id": spec.pad_id,
    }


def schedule_config(spec: ScheduleSpec) -> Config:
    if spec.sigma_range:
        return edm.config_of_schedule(spec) | {"_diffusers_version": DIFFUSERS_VERSION}
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_start": spec.beta_start,
        "beta_end": spec.beta_end,
        "beta_schedule": spec.beta_schedule,
        "num_train_timesteps": spec.timesteps,
        "prediction_type": spec.prediction,
        "timestep_spacing": spec.spacing,
        "steps_offset": spec.steps_offset,
        "set_alpha_to_one": spec.final_alpha_one,
        "rescale_betas_zero_snr": spec.zero_terminal_snr,
        "clip_sample": False,
    }

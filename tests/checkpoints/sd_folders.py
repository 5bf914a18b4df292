"""Stable Diffusion's models with random weights, as folders that `diffusers` writes.

They have their published width or are narrow. Shapes are those of the published configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.checkpoint import tokenizers
from tests.checkpoints.tiny import byte_tokenizer, fill_randomly

Options = Mapping[str, Any]
CLIP_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
          "hidden_act": "quick_gelu"}  # fmt: skip
CLIP_H = {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096,
          "hidden_act": "gelu"}  # fmt: skip
CLIP_G = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120,
          "hidden_act": "gelu", "projection_dim": 1280}  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
KL_F8, KL_F4 = (128, 256, 512, 512), (128, 256, 512)
PUBLISHED_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # wrong, as in published configs
FIRST = "!"  # the token with id 0, the padding of some of these models
ATTENDS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
SD1 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "sample_size": 64}
SD2 = SD1 | {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
X4 = {
    "block_out_channels": (256, 512, 512, 1024), "cross_attention_dim": 1024, "use_linear_projection": True,
    "sample_size": 128, "only_cross_attention": (True, True, True, False), "num_class_embeds": 1000,
    "in_channels": 7, "down_block_types": (PLAIN[0], *ATTENDS[:1] * 3),
    "up_block_types": (*ATTENDS[1:] * 3, PLAIN[1]),
}  # fmt: skip
XL = {
    "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "use_linear_projection": True,
    "sample_size": 128, "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "down_block_types": (PLAIN[0], *ATTENDS[:1] * 2),
    "up_block_types": (*ATTENDS[1:] * 2, PLAIN[1]),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The shape of a model."""

    pipeline: str
    unet: Options
    texts: tuple[Options, ...]
    pad: int | None = None  # padding id of the last tokenizer; None: the end token
    stage: tuple[int, ...] = KL_F8
    scale: float = 0.18215
    prediction: str = "epsilon"
    betas: tuple[float, float] = (0.00085, 0.012)
    extra: Options = field(default_factory=dict)  # further arguments of the pipeline
    scheduler: type = DDIMScheduler
    schedule: Options = field(default_factory=dict)  # further arguments of the scheduler
    vae: Options = field(default_factory=dict)  # further arguments of the autoencoder
    refines: bool = False  # SDXL's refiner: the only text encoder is the second


INPAINT = {"in_channels": 9}
NONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
ROWS = {
    "sd1": Row("StableDiffusionPipeline", SD1, (CLIP_L,), extra=NONE),
    "sd1-inpainting": Row("StableDiffusionInpaintPipeline", SD1 | INPAINT, (CLIP_L,), extra=NONE),
    "sd2-base": Row("StableDiffusionPipeline", SD2, (CLIP_H,), 0, extra=NONE),
    "sd2-v": Row(
        "StableDiffusionPipeline", SD2 | {"sample_size": 96}, (CLIP_H,), 0, prediction="v_prediction",
        extra=NONE,
    ),
    "sd2-inpainting": Row("StableDiffusionInpaintPipeline", SD2 | INPAINT, (CLIP_H,), 0, extra=NONE),
    "x4-upscaler": Row(
        "StableDiffusionUpscalePipeline", X4, (CLIP_H,), 0, KL_F4, 0.08333, "v_prediction", (0.0001, 0.02)
    ),
    "xl": Row("StableDiffusionXLPipeline", XL, (CLIP_L, CLIP_G), 0, scale=0.13025),
    "xl-inpainting": Row(
        "StableDiffusionXLInpaintPipeline", XL | INPAINT, (CLIP_L, CLIP_G), 0, scale=0.13025
    ),
}  # fmt: skip

REFINER = {
    "block_out_channels": (384, 768, 1536, 1536), "cross_attention_dim": 1280, "use_linear_projection": True,
    "sample_size": 128, "attention_head_dim": (6, 12, 24, 24), "transformer_layers_per_block": 4,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
    "down_block_types": (PLAIN[0], *ATTENDS[:1] * 2, PLAIN[0]),
    "up_block_types": (PLAIN[1], *ATTENDS[1:] * 2, PLAIN[1]),
}  # fmt: skip
MORE_ROWS = {
    "xl-refiner": Row(
        "StableDiffusionXLImg2ImgPipeline", REFINER, (CLIP_G,), 0, scale=0.13025, refines=True,
        extra={"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
    ),
    "xl-zero-snr": Row(
        "StableDiffusionXLPipeline", XL, (CLIP_L, CLIP_G), 0, scale=0.13025, prediction="v_prediction",
        schedule={"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "playground": Row(
        "StableDiffusionXLPipeline", XL, (CLIP_L, CLIP_G), 0, scale=0.5,
        scheduler=EDMDPMSolverMultistepScheduler,
        vae={
            "latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]
        },
    ),
    "cosxl": Row(
        "StableDiffusionXLPipeline", XL, (CLIP_L, CLIP_G), 0, scale=0.13025, prediction="v_prediction",
        scheduler=EDMEulerScheduler, schedule={"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0},
    ),
    "cosxl-edit": Row(
        "StableDiffusionXLInstructPix2PixPipeline", XL | {"in_channels": 8}, (CLIP_L, CLIP_G), 0,
        scale=0.13025, prediction="v_prediction", scheduler=EDMEulerScheduler,
        schedule={"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0}, extra={"is_cosxl_edit": True},
    ),
    "pix2pix": Row(
        "StableDiffusionInstructPix2PixPipeline", SD1 | {"in_channels": 8}, (CLIP_L,), extra=NONE
    ),
    "xl-pix2pix": Row(
        "StableDiffusionXLInstructPix2PixPipeline", XL | {"in_channels": 8}, (CLIP_L, CLIP_G), 0,
        scale=0.13025,
    ),
    # Models for few steps, with the names of published ones.
    "lcm-dreamshaper": Row(
        "LatentConsistencyModelPipeline", SD1 | {"time_cond_proj_dim": 256}, (CLIP_L,), extra=NONE,
        scheduler=LCMScheduler,
    ),
    "sd-turbo": Row(
        "StableDiffusionPipeline", SD2, (CLIP_H,), 0, extra=NONE, scheduler=EulerAncestralDiscreteScheduler,
        schedule={"timestep_spacing": "trailing"},
    ),
    "sdxl-turbo": Row(
        "StableDiffusionXLPipeline", XL, (CLIP_L, CLIP_G), 0, scale=0.13025,
        scheduler=EulerAncestralDiscreteScheduler, schedule={"timestep_spacing": "trailing"},
    ),
}  # fmt: skip


def unet_options(row: Row, narrow: bool) -> dict[str, Any]:
    """Options of UNet2DConditionModel. narrow: fewer channels, heads and layers."""
    options = dict(row.unet)
    if narrow:
        levels = len(options["block_out_channels"])
        options |= {
            "block_out_channels": (16, 32, 48, 48)[:levels], "sample_size": 8, "norm_num_groups": 8,
            "cross_attention_dim": sum(text["hidden_size"] for text in text_options(row, narrow)),
        }  # fmt: skip
        if "time_cond_proj_dim" in options:
            options["time_cond_proj_dim"] = 12
        if "attention_head_dim" in options:
            options["attention_head_dim"] = (2, 4, 6, 6)[:levels]
        if "addition_embed_type" in options:
            options |= {
                "transformer_layers_per_block": 2 if row.refines else (1, 2, 3), "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 24 + (5 if row.refines else 6) * 8,
            }  # fmt: skip
    return options


def text_options(row: Row, narrow: bool) -> list[dict[str, Any]]:
    """Options of CLIPTextConfig for each text encoder."""
    if not narrow:
        return [dict(text) for text in row.texts]
    small = [dict(text) | SMALL for text in row.texts]
    for second in small[0 if row.refines else 1 :]:
        second |= {"hidden_size": 48, "projection_dim": 24}
    return small


def tokenizer_of(narrow: bool, pad: int | None) -> CLIPTokenizer:
    if not narrow:
        return tokenizers.clip(pad)
    return byte_tokenizer() if pad is None else byte_tokenizer(pad=FIRST)


def unet(row: Row, narrow: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(**unet_options(row, narrow))


def autoencoder(row: Row, narrow: bool) -> AutoencoderKL:
    channels = (16, 32, 32, 32)[: len(row.stage)] if narrow else row.stage
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels, layers_per_block=2, norm_num_groups=8 if narrow else 32,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=64 if narrow else 512, scaling_factor=row.scale, **row.vae,
    )  # fmt: skip


def text_encoders(row: Row, narrow: bool) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
    vocabulary = len(tokenizer_of(narrow, None))
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)[row.refines :]
    return [
        kind(CLIPTextConfig(vocab_size=vocabulary, **PUBLISHED_IDS, **options))
        for kind, options in zip(kinds, text_options(row, narrow), strict=False)
    ]


def scheduler(row: Row, betas: Options) -> Any:
    options = {"steps_offset": 1, "prediction_type": row.prediction} | row.schedule
    if row.scheduler is DDIMScheduler:
        options |= {"clip_sample": False, "set_alpha_to_one": False}
    if row.scheduler in (EDMEulerScheduler, EDMDPMSolverMultistepScheduler):
        return row.scheduler(prediction_type=row.prediction, **row.schedule)
    return row.scheduler(**betas, **options)


def parts(row: Row, narrow: bool) -> dict[str, Any]:
    """The parts of the pipeline, not yet with their final random weights."""
    texts = text_encoders(row, narrow)
    pads = [None] * (len(texts) - 1) + [row.pad]
    betas = {"beta_start": row.betas[0], "beta_end": row.betas[1], "beta_schedule": "scaled_linear"}
    made = {
        "unet": unet(row, narrow),
        "vae": autoencoder(row, narrow),
        "scheduler": scheduler(row, betas),
    }
    if row.refines:
        made |= {"text_encoder": None, "tokenizer": None}
    for name, text, pad in zip(("", "_2")[row.refines :], texts, pads, strict=False):
        made |= {f"text_encoder{name}": text, f"tokenizer{name}": tokenizer_of(narrow, pad)}
    if row.pipeline == "StableDiffusionUpscalePipeline":
        made["low_res_scheduler"] = DDPMScheduler(**betas)
    return made


def pipeline(name: str, narrow: bool = True) -> Any:
    """The pipeline of `diffusers` for a model, with random weights."""
    row = (ROWS | MORE_ROWS)[name]
    made = parts(row, narrow)
    networks = [part for part in made.values() if isinstance(part, torch.nn.Module)]
    for seed, network in enumerate(networks):
        fill_randomly(network, seed)
        network.eval().requires_grad_(False)
    reference = getattr(diffusers, row.pipeline)(**made, **row.extra)
    reference.set_progress_bar_config(disable=True)
    return reference


def write(folder: Path, name: str, narrow: bool = True, **options: Any) -> Path:
    """Write a model's folder by `diffusers`. options: of save_pretrained()."""
    pipeline(name, narrow).save_pretrained(folder / name, **options)
    return folder / name

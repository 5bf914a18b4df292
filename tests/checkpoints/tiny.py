"""Tiny models with random weights: in the structure of Stable Diffusion 1.x and XL, and an upscaler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTokenizer

from models.adapter_specs import ControlNetSpec
from models.adapters.control_net import save_control
from models.checkpoint import save
from models.conditioning.conditioner import LayoutProjection, TextConditioner
from models.conditioning.text_encoder import TextEncoder
from models.latent_diffusion import LatentDiffusion
from models.networks.autoencoder import Autoencoder
from models.networks.control_net import ControlNet
from models.networks.unet import UNet
from models.spec import (
    ALL_TASKS,
    AutoencoderSpec,
    Defaults,
    ModelSpec,
    Prediction,
    ScheduleSpec,
    TextSpec,
    UNetSpec,
    UpscalingSpec,
)

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def byte_tokenizer(tokens: int = 77, pad: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer without merges: two tokens per byte, one of them for the end of a word."""
    alphabet = sorted(ByteLevel.alphabet())
    entries = [*alphabet, *(c + "</w>" for c in alphabet), BEGIN, END]
    vocabulary = {token: index for index, token in enumerate(entries)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=tokens)


def fill_randomly(module: nn.Module, seed: int) -> None:
    """Set every parameter: matrices keep their input's scale, norms are near 1, all others near 0."""
    generator = torch.Generator().manual_seed(seed)
    norms = {m for m in module.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                fan_in = 1 if isinstance(part, nn.Embedding) else parameter[0].numel()
                value = noise / fan_in**0.5
            else:
                value = 0.1 * noise + (1.0 if part in norms and name == "weight" else 0.0)
            parameter.data.copy_(value)


def scene_spec() -> ModelSpec:
    """tiny_spec() with all tasks but upscaling: also takes a mask, a masked image and 3 layout channels."""
    spec = tiny_spec()
    unet = replace(spec.unet, in_channels=4 + 1 + 4 + 3)
    labels = ("cat", "dog", "bird")
    return replace(
        spec,
        name="scene",
        unet=unet,
        tasks=ALL_TASKS[:-1],
        mask_channels=True,
        layout_channels=3,
        labels=labels,
    )


def tiny_spec(prediction: Prediction = "epsilon", tokens: int = 77) -> ModelSpec:
    """Stable Diffusion 1.x's structure: 64x64 images from latents of (4, 8, 8)."""
    tokenizer = byte_tokenizer(tokens)
    return ModelSpec(
        name="tiny",
        unet=UNetSpec(
            in_channels=4, out_channels=4, channels=(32, 64), res_blocks=1, transformer_depth=(1, 0),
            middle_depth=1, heads=(4, 4), context_width=32, groups=8,
        ),
        autoencoder=AutoencoderSpec(
            channels=(16, 16, 16, 16), res_blocks=1, latent_channels=4, scale_factor=0.18215, groups=8,
            sample_size=64,
        ),
        schedule=ScheduleSpec(prediction=prediction),
        texts=(TextSpec(
            vocabulary=len(tokenizer), width=32, layers=2, heads=4, intermediate=64, tokens=tokens,
            eos_id=tokenizer.eos_token_id, bos_id=tokenizer.bos_token_id, pad_id=tokenizer.pad_token_id,
        ),),
        defaults=Defaults(width=64, height=64, steps=5, guidance_scale=3.0),
    )  # fmt: skip


def xl_spec() -> ModelSpec:
    """SDXL's structure: two text encoders, pooled text, size conditioning, transformers of two depths."""
    spec = tiny_spec()
    unet = replace(
        spec.unet, transformer_depth=(0, 1), middle_depth=2, context_width=32 + 48, linear_projection=True,
        added_width=24 + 6 * 8, size_width=8,
    )  # fmt: skip
    first = replace(spec.texts[0], skipped=1, final_norm=False)
    second = replace(first, width=48, layers=3, activation="gelu", pooled=24)
    return replace(spec, name="xl", unet=unet, texts=(first, second), zero_null=True)


def upscaler_spec() -> ModelSpec:
    """An upscaler by 4 in tiles of 16x16 cells, without text, with noise levels up to 9."""
    return ModelSpec(
        name="upscaler",
        unet=UNetSpec(
            in_channels=4 + 3, out_channels=4, channels=(32, 64), res_blocks=1, transformer_depth=(0, 0),
            middle_depth=0, heads=(1, 1), context_width=0, groups=8, noise_levels=10,
        ),
        autoencoder=AutoencoderSpec(
            channels=(16, 16, 16), res_blocks=1, latent_channels=4, scale_factor=0.5, groups=8,
            sample_size=64, middle_attention=False,
        ),
        schedule=ScheduleSpec(prediction="v_prediction"),
        texts=(),
        defaults=Defaults(width=64, height=64, steps=3, guidance_scale=1.0, noise_level=2),
        tasks=("upscaling",),
        upscaling=UpscalingSpec(ScheduleSpec(0.0001, 0.02, "linear"), 9),
    )  # fmt: skip


def tiny_model(seed: int = 0, prediction: Prediction = "epsilon") -> LatentDiffusion:
    """A model of tiny_spec(), float32 on the CPU."""
    return random_model(tiny_spec(prediction), seed)


def random_model(spec: ModelSpec, seed: int = 0) -> LatentDiffusion:
    """A model of this shape with random weights, float32 on the CPU."""
    conditioner = random_conditioner(spec) if spec.texts else None
    model = LatentDiffusion(spec, UNet(spec.unet), Autoencoder(spec.autoencoder), conditioner)
    for index, network in enumerate(filter(None, (model.unet, model.autoencoder, conditioner))):
        fill_randomly(network, seed + index)
        network.requires_grad_(False).eval()
    return model


def random_conditioner(spec: ModelSpec) -> TextConditioner:
    encoders = [TextEncoder(text, byte_tokenizer(text.tokens)) for text in spec.texts]
    layout = LayoutProjection(spec.texts[0].width, spec.layout_channels) if spec.layout_channels else None
    return TextConditioner(encoders, layout, spec.labels, spec.zero_null)


def write_tiny_model(path: Path, seed: int = 0, prediction: Prediction = "epsilon") -> Path:
    """Write tiny_model() as a diffusers folder; returns its path."""
    save(tiny_model(seed, prediction), path)
    return path


def tiny_control(seed: int = 0, types: int = 0) -> ControlNet:
    """A ControlNet for tiny_model(); with `types`, for several kinds of control image."""
    unet = tiny_spec().unet
    network = ControlNet(ControlNetSpec(unet, hint_widths=(4, 4, 8, 8), control_types=types))
    fill_randomly(network, seed)
    return network.requires_grad_(False).eval()


def write_tiny_control(folder: Path, seed: int = 0) -> Path:
    """Write a ControlNet for tiny_model() in the layout of diffusers; returns its folder."""
    save_control(tiny_control(seed), folder, torch.float32)
    return folder

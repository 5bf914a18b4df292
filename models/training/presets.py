"""The shapes of the bundled models, which `ldm train` makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import CLIPTokenizer

from models.spec import (
    ALL_TASKS,
    AutoencoderSpec,
    Defaults,
    ModelSpec,
    ScheduleSpec,
    TextSpec,
    UNetSpec,
    UpscalingSpec,
)
from models.training.scenes import SIZE

TOKENS = 24  # the longest caption of two objects takes 22
CONTEXT_WIDTH = 192

AUTOENCODER = AutoencoderSpec(
    channels=(96, 160),
    res_blocks=1,
    latent_channels=24,
    scale_factor=1.0,  # replaced after training: see model_spec() and upscaler_spec()
    sample_size=SIZE,
    patch_size=4,
)
LAYOUT_CHANNELS = 16
UNET = UNetSpec(
    in_channels=2 * AUTOENCODER.latent_channels
    + 1
    + LAYOUT_CHANNELS,  # z, mask, masked image's latent, layout
    out_channels=AUTOENCODER.latent_channels,
    channels=(128, 192),
    res_blocks=1,
    transformer_depth=(0, 1),
    middle_depth=1,
    heads=(4, 4),
    context_width=CONTEXT_WIDTH,
)
# With these betas the last timestep is almost pure noise, as is the start of sampling. Any difference between
# the two would show in flat backgrounds.
SCHEDULE = ScheduleSpec(
    beta_start=0.0001,
    beta_end=0.02,
    beta_schedule="linear",
    prediction="v_prediction",
    spacing="trailing",
    steps_offset=0,
    final_alpha_one=True,
)
DEFAULTS = Defaults(width=SIZE, height=SIZE, steps=25, guidance_scale=3.0)


def text_spec(tokenizer: CLIPTokenizer) -> TextSpec:
    """A small text transformer over the tokenizer's vocabulary."""
    return TextSpec(
        vocabulary=len(tokenizer),
        width=CONTEXT_WIDTH,
        layers=2,
        heads=4,
        intermediate=4 * CONTEXT_WIDTH,
        tokens=TOKENS,
        eos_id=tokenizer.eos_token_id,
        bos_id=tokenizer.bos_token_id,
        pad_id=tokenizer.pad_token_id,
    )


def model_spec(name: str, text: TextSpec, scale_factor: float, labels: Sequence[str]) -> ModelSpec:
    """The whole text-to-image model. scale_factor: gives its latents a standard deviation of 1."""
    return ModelSpec(
        name,
        UNET,
        replace(AUTOENCODER, scale_factor=scale_factor),
        SCHEDULE,
        (text,),
        DEFAULTS,
        tasks=tuple(task for task in ALL_TASKS if task != "upscaling"),
        mask_channels=True,
        layout_channels=LAYOUT_CHANNELS,
        labels=tuple(labels),
    )


# The upscaler: one latent cell for each pixel of the low-resolution image, whose colours are concat channels.
SHARP_AUTOENCODER = AutoencoderSpec(
    channels=(64, 96),
    res_blocks=1,
    latent_channels=12,
    scale_factor=1.0,  # replaced after training: see model_spec() and upscaler_spec()
    sample_size=SIZE,
    patch_size=2,
    middle_attention=False,  # it would make a cell depend on the rest of its tile
)
UPSCALING = UpscalingSpec(
    ScheduleSpec(0.0001, 0.02, "linear"), max_noise_level=100, residual=True, back_projection=True
)
UPSCALER = UNetSpec(
    in_channels=2 * SHARP_AUTOENCODER.latent_channels + SHARP_AUTOENCODER.image_channels,
    out_channels=SHARP_AUTOENCODER.latent_channels,
    channels=(64, 96),
    res_blocks=1,
    transformer_depth=(0, 0),
    middle_depth=0,
    heads=(1, 1),
    context_width=0,
    noise_levels=UPSCALING.max_noise_level + 1,
)
UPSCALER_DEFAULTS = Defaults(width=256, height=256, steps=1, guidance_scale=1.0)


def upscaler_spec(name: str, scale_factor: float) -> ModelSpec:
    """The whole upscaler. scale_factor: gives its latents a standard deviation of 1."""
    return ModelSpec(
        name,
        UPSCALER,
        replace(SHARP_AUTOENCODER, scale_factor=scale_factor),
        SCHEDULE,
        (),
        UPSCALER_DEFAULTS,
        tasks=("upscaling",),
        upscaling=UPSCALING,
    )

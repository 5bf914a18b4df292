"""A1111's options: its settings, which a request may override.

Options that would change images and that this service does not support are accepted only with values that do
not change images. All other options (file names, user interface, memory, ...) are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from models.spec import ModelSpec
from service.errors import InvalidRequest

CHECKPOINT = "sd_model_checkpoint"
CLIP_SKIP = "CLIP_stop_at_last_layers"
DECODER = "sd_vae_decode_method"
DECODERS = {"Full": None, "TAESD": "tiny"}  # A1111's name -> native `decoder`
FORMAT = "samples_format"
FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}

# Option -> its values that do not change images, A1111's default first.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "CLIP_stop_at_last_layers": (1,),
    "always_discard_next_to_last_sigma": (False,),
    "comma_padding_backtrack": (20,),
    "ddim_discretize": ("uniform",),
    "emphasis": ("Original",),
    "enable_batch_seeds": (True,),
    "enable_emphasis": (True,),
    "enable_quantization": (False,),
    "eta_ancestral": (1.0,),
    "eta_ddim": (0.0,),
    "eta_noise_seed_delta": (0,),
    "extra_networks_default_multiplier": (1.0,),
    "face_restoration": (False,),
    "forge_additional_modules": ([],),
    "fp8_storage": ("Disable",),
    "hires_fix_refiner_pass": ("second pass",),
    "k_sched_type": ("Automatic",),
    "pad_cond_uncond": (False,),
    "pad_cond_uncond_v0": (False,),
    "randn_source": ("GPU", "CPU"),
    "return_mask": (False,),
    "return_mask_composite": (False,),
    "rho": (0.0,),
    "s_churn": (0.0,),
    "s_min_uncond": (0.0,),
    "s_noise": (1.0,),
    "sd_hypernetwork": ("None", ""),
    "sd_lora": ("None", ""),
    "sd_noise_schedule": ("Default",),
    "sd_unet": ("Automatic", "None"),
    "sd_vae": ("Automatic", "None", ""),
    "sd_vae_decode_method": ("Full",),
    "sd_vae_encode_method": ("Full",),
    "sdxl_clip_l_skip": (False,),
    "sdxl_crop_left": (0,),
    "sdxl_crop_top": (0,),
    "sgm_noise_multiplier": (False,),
    "sigma_max": (0.0,),
    "sigma_min": (0.0,),
    "skip_early_cond": (0.0,),
    "tiling": (False,),
    "token_merging_ratio": (0.0,),
    "use_downcasted_alpha_bar": (False,),
    "use_old_emphasis_implementation": (False,),
    "use_old_karras_scheduler_sigmas": (False,),
}
# The same for options that only img2img uses.
NEUTRAL_IMG2IMG: Mapping[str, tuple[Any, ...]] = {
    "img2img_background_color": ("#ffffff", "#fff", "white"),
    "img2img_color_correction": (False,),
    "img2img_extra_noise": (0.0,),
    "img2img_fix_steps": (False,),
    "initial_noise_multiplier": (1.0,),
    "inpainting_mask_weight": (1.0,),
    "token_merging_ratio_img2img": (0.0,),
    "upscaler_for_img2img": (None, "None", "", "Lanczos"),
}
# The same for options that only one sampler uses.
NEUTRAL_SAMPLER: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "UniPC": {
        "uni_pc_lower_order_final": (True,),
        "uni_pc_order": (3, 2),
        "uni_pc_skip_type": ("time_uniform",),
        "uni_pc_variant": ("bh1", "bh2"),
    }
}
SUPPORTED = (CHECKPOINT, FORMAT)
ONLY_SOMETIMES = {*NEUTRAL_IMG2IMG, *(name for table in NEUTRAL_SAMPLER.values() for name in table)}


def check_options(
    options: Mapping[str, Any], *tables: Mapping[str, tuple[Any, ...]], within: str = ""
) -> list[str]:
    """Raise InvalidRequest for unsupported options that would change an image; return ignored names.

    tables: tables like NEUTRAL that also apply. within: the field that contains the options, for errors.
    """
    ignored = []
    for name, value in options.items():
        param = f"{within}.{name}" if within else name
        neutral = next((table[name] for table in (NEUTRAL, *tables) if name in table), None)
        if neutral is not None:
            if value is not None and not is_one_of(value, neutral):
                expected = " or ".join(map(json.dumps, neutral))
                raise InvalidRequest(f"{param} must be {expected}", param=param)
        elif name not in (*SUPPORTED, *ONLY_SOMETIMES):
            ignored.append(param)
    return ignored


def is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of these, or a text of one: A1111 reads "1" as 1 and "false" as false."""
    return value in neutral or (
        isinstance(value, str) and value.strip().lower() in {str(known).lower() for known in neutral}
    )


def read_text(options: Mapping[str, Any], name: str, within: str = "") -> str | None:
    """The text of an option; None if it is missing, null or empty. Raises InvalidRequest."""
    value, param = options.get(name), f"{within}.{name}" if within else name
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"{param} must be a string", param=param)
    return value or None


def read_format(options: Mapping[str, Any], within: str = "") -> str | None:
    """The image format that `samples_format` selects, or None. Raises InvalidRequest."""
    name, param = read_text(options, FORMAT, within), f"{within}.{FORMAT}" if within else FORMAT
    if name is None:
        return None
    if name.lower() not in FORMATS:
        raise InvalidRequest(f"{param} must be one of {', '.join(FORMATS)}", param=param)
    return FORMATS[name.lower()]


def reads_clip_skip(spec: ModelSpec) -> bool:
    """Whether A1111 applies clip skip to a model: only to OpenAI's CLIP in Stable Diffusion 1.x."""
    return len(spec.texts) == 1 and spec.texts[0].activation == "quick_gelu"


def clip_skip_of(options: Mapping[str, Any], within: str = "") -> int | None:
    """The number in `CLIP_stop_at_last_layers`, or None. Raises InvalidRequest."""
    value, param = options.get(CLIP_SKIP), f"{within}.{CLIP_SKIP}" if within else CLIP_SKIP
    text = str(value).strip()
    if value is None or text.isdecimal():
        return None if value is None else max(1, int(text))
    raise InvalidRequest(f"{param} must be a whole number from 1", param=param)


def decoder_of(options: Mapping[str, Any], within: str = "") -> str | None:
    """The native decoder that `sd_vae_decode_method` selects; None: the full one. Raises InvalidRequest."""
    name, param = read_text(options, DECODER, within) or "Full", f"{within}.{DECODER}" if within else DECODER
    if name not in DECODERS:
        raise InvalidRequest(f"{param} must be one of {', '.join(DECODERS)}", param=param)
    return DECODERS[name]


def defaults() -> dict[str, Any]:
    """All options that change images, with A1111's defaults."""
    tables: Collection[Mapping[str, tuple[Any, ...]]] = (NEUTRAL, NEUTRAL_IMG2IMG, *NEUTRAL_SAMPLER.values())
    return {name: values[0] for table in tables for name, values in table.items()}

"""The configuration files of a diffusers folder <-> ModelSpec.

Free of torch, so that a process that only checks requests can read what a model is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

from models.errors import CheckpointError
from models.formats import single_file
from models.formats.config_files import OWN_FILE, Config, read_json
from models.spec import (
    ALL_TASKS,
    AutoencoderSpec,
    Defaults,
    ModelSpec,
    Prediction,
    ScheduleSpec,
    Spacing,
    TextSpec,
    UNetSpec,
    UpscalingSpec,
)

PLAIN, INPAINTING, UPSCALING, XL, XL_INPAINTING, SUPER_RESOLUTION = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LDMSuperResolutionPipeline",
)
WITH_TEXT = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
}
WITH_TEXTS = WITH_TEXT | {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
PIPELINES = {  # -> the folder of each part, and its class
    PLAIN: WITH_TEXT,
    INPAINTING: WITH_TEXT,
    UPSCALING: WITH_TEXT,
    XL: WITH_TEXTS,
    XL_INPAINTING: WITH_TEXTS,
    SUPER_RESOLUTION: {"unet": "UNet2DModel", "vqvae": "AutoencoderKL"},
}
TEXT_ENCODERS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
LIBRARIES = dict.fromkeys((*TEXT_ENCODERS, *TOKENIZERS), "transformers")  # of the others: diffusers
EMPTY = {  # parts that a pipeline may have and that we write none of
    PLAIN: ("feature_extractor", "image_encoder", "safety_checker"),
    INPAINTING: ("feature_extractor", "image_encoder", "safety_checker"),
    UPSCALING: ("feature_extractor", "safety_checker", "watermarker"),
    XL: ("feature_extractor", "image_encoder"),
    XL_INPAINTING: ("feature_extractor", "image_encoder"),
    SUPER_RESOLUTION: (),
}
XL_SIZES = 6  # numbers of sizes that its UNets are told; other ones are told of beauty too
SCHEDULER, NOISE = "scheduler", "low_res_scheduler"  # NOISE: of what lies on low-resolution pictures
OWN_KEYS = ("name", "defaults", "tasks", "layout_channels", "labels")
RESIDUAL = "residual"  # of an upscaler's latents

# Options that change what a network computes and that ours has at one value only: the values accepted. What a
# configuration leaves out has the first of them.
UNET_FIXED = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "mid_block_only_cross_attention": (None, False),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "reverse_transformer_layers_per_block": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}
VAE_FIXED = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None, 0),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True, False),
}
PLAIN_UNET_FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "resnet_time_scale_shift": ("default",),
    "add_attention": (False,),
    "class_embed_type": (None,),
}
TEXT_FIXED = {"layer_norm_eps": (1e-5,), "hidden_act": ("quick_gelu", "gelu")}
SCHEDULER_FIXED = {
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "trained_betas": (None, []),
    "clip_sample": (False,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
}
ATTENDS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


def read_spec(
    path: str | Path, allow_pickle: bool = False, prediction: Prediction | None = None
) -> ModelSpec:
    """What the model in a diffusers folder or in a single file is, without its weights.

    allow_pickle: look at .ckpt files too; they never run code even then. prediction: of a single file of
    Stable Diffusion 2, where neither it nor a YAML file beside it says; if None, v. Raises CheckpointError,
    naming the file and the option.
    """
    path = Path(path)
    if file := single_file.weights_of(path):
        spec = with_text(single_file.describe(file, allow_pickle, prediction), file.parent)
        if spec.texts:
            check_fit(spec, path)
        own = single_file.own_folder(file)
        return with_own_file(with_own_inputs(spec, own), own) if own else spec
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a folder nor a .safetensors or .ckpt file")
    index = check_components(path)
    pipeline, upscaling = index["_class_name"], None
    config, unet = read_part(path, "unet", READERS[PIPELINES[pipeline]["unet"]])
    _, autoencoder = read_part(
        path, autoencoder_folder(path).name, AUTOENCODERS.get(pipeline, autoencoder_spec)
    )
    _, schedule = read_part(path, SCHEDULER, schedule_spec)
    if pipeline in (SUPER_RESOLUTION, UPSCALING):
        upscaling = translated(path / "model_index.json", upscaling_spec, index, path)
    latents = autoencoder.latent_channels
    spec = ModelSpec(
        path.resolve().name, unet, autoencoder, schedule, text_specs(path, pipeline), upscaling=upscaling,
        # These pipelines take a UNet without channels for a mask too.
        mask_channels=pipeline in (INPAINTING, XL_INPAINTING) and unet.in_channels != latents,
        tasks=("upscaling",) if upscaling else ALL_TASKS[:3],
        zero_null="text_encoder_2" in PIPELINES[pipeline] and index.get("force_zeros_for_empty_prompt", True),
    )  # fmt: skip
    spec = with_own_inputs(spec, path)
    check_fit(spec, path)
    side = translated(config_file(path, "unet"), sample_side, config, spec)
    return with_own_file(replace(spec, defaults=defaults_of(spec, *side)), path)


def text_specs(path: Path, pipeline: str) -> tuple[TextSpec, ...]:
    """Of the text encoders in a folder."""
    if pipeline in (XL, XL_INPAINTING):
        readers = dict(zip(TEXT_ENCODERS, (inner_text_spec, inner_pooled_text_spec), strict=True))
    else:
        readers = {"text_encoder": text_spec} if "text_encoder" in PIPELINES[pipeline] else {}
    return tuple(read_part(path, part, reader)[1] for part, reader in readers.items())


def defaults_of(spec: ModelSpec, width: int, height: int) -> Defaults:
    """Of a folder whose own file does not say."""
    if not spec.texts:
        return Defaults(width, height, guidance_scale=1.0)
    if spec.upscaling:
        return Defaults(
            width, height, guidance_scale=9.0, noise_level=min(20, spec.upscaling.max_noise_level)
        )
    return Defaults(width, height)


def config_file(path: Path, part: str) -> Path:
    """The configuration of a part of a folder."""
    return path / part / ("scheduler_config.json" if part in (SCHEDULER, NOISE) else "config.json")


def read_part(path: Path, part: str, reader: Callable[[Config], Any]) -> tuple[Config, Any]:
    """The configuration of a part, and what the reader makes of it."""
    config = read_json(config_file(path, part))
    return config, translated(config_file(path, part), reader, config)


def autoencoder_folder(path: Path) -> Path:
    """Where a folder has its autoencoder."""
    return path / ("vqvae" if (path / "vqvae").is_dir() else "vae")


def translated(file: Path, reader: Any, *args: Any) -> Any:
    """A reader's answer; what is wrong with the values becomes one sentence that names the file."""
    try:
        return reader(*args)
    except KeyError as error:
        raise CheckpointError(f"{file}: {error} is missing") from error
    except (TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def check_components(path: Path) -> Config:
    """The index of a folder. Refuses one that names a pipeline or parts that we do not have."""
    file = path / "model_index.json"
    index = read_json(file)
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise CheckpointError(f"{file}: pipeline {pipeline!r}; supported are {', '.join(PIPELINES)}")
    for part, expected in PIPELINES[pipeline].items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found not in (expected, expected + "Fast"):
            raise CheckpointError(f"{file}: {part} is {found!r}; supported is {expected}")
    if index.get("requires_aesthetics_score"):
        raise CheckpointError(f"{file}: requires_aesthetics_score is true, which is not supported")
    return index


def check_fixed(config: Config, fixed: dict[str, tuple]) -> None:
    """Refuse options at values that ours does not have."""
    for option, accepted in fixed.items():
        value = config.get(option, accepted[0])
        values = set(value) if isinstance(value, list) and value else {None if value == [] else value}
        if not all(v in accepted for v in values):
            raise ValueError(f"{option} is {value!r}, which is not supported; expected {accepted[0]!r}")


def per_level(value: Any, levels: int, name: str) -> tuple[int, ...]:
    """A number for all levels or a list with one for each, as one for each."""
    values = tuple(value) if isinstance(value, list) else (value,) * levels
    if len(values) != levels or not all(type(v) is int and v > 0 for v in values):
        raise ValueError(f"{name} must be a positive integer, or {levels} of them, not {value!r}")
    return values


def only(value: Any, name: str) -> int:
    """One positive integer, or a list that repeats it."""
    values = set(per_level(value, len(value) if isinstance(value, list) else 1, name))
    if len(values) != 1:
        raise ValueError(f"{name} must be the same at every level, not {value!r}")
    return values.pop()


def widths(config: Config) -> tuple[int, ...]:
    """Channels of each level, which the groups of the norms must divide."""
    value, groups = config["block_out_channels"], only(config.get("norm_num_groups", 32), "norm_num_groups")
    channels = per_level(value, len(value) if isinstance(value, list) and value else 1, "block_out_channels")
    if any(width % groups for width in channels):
        raise ValueError(f"block_out_channels {value} must be multiples of norm_num_groups, {groups}")
    return channels


def attends(config: Config, key: str, levels: int) -> list[bool]:
    """Which levels attend, from the names of their blocks."""
    names = config[key]
    unknown = [name for name in names if name not in ATTENDS]
    if unknown:
        raise ValueError(f"{key} has {unknown[0]!r}; supported are {', '.join(ATTENDS)}")
    if len(names) != levels:
        raise ValueError(f"{key} must name {levels} blocks, not {len(names)}")
    return [ATTENDS[name] for name in names]


def unet_spec(config: Config) -> UNetSpec:
    check_fixed(config, UNET_FIXED)
    channels = widths(config)
    levels = len(channels)
    down = attends(config, "down_block_types", levels)
    if attends(config, "up_block_types", levels) != down[::-1]:
        raise ValueError("up_block_types must attend at the same levels as down_block_types")
    # The file's name for the number of heads is a published mistake: for these models it never was a width.
    heads = per_level(config.get("attention_head_dim", 8), levels, "attention_head_dim")
    for width, count in zip(channels, heads, strict=True):
        if width % count:
            raise ValueError(f"attention_head_dim {count} (heads) does not divide {width} channels")
    depth = per_level(config.get("transformer_layers_per_block", 1), levels, "transformer_layers_per_block")
    depths = tuple(d if attend else 0 for d, attend in zip(depth, down, strict=True))
    classes, added = config.get("num_class_embeds"), config.get("addition_embed_type") is not None
    return UNetSpec(
        in_channels=only(config["in_channels"], "in_channels"),
        out_channels=only(config["out_channels"], "out_channels"),
        channels=channels,
        res_blocks=only(config.get("layers_per_block", 2), "layers_per_block"),
        transformer_depth=depths,
        middle_depth=depth[-1],
        heads=heads,
        context_width=only(config["cross_attention_dim"], "cross_attention_dim"),
        groups=config.get("norm_num_groups", 32),
        linear_projection=bool(config.get("use_linear_projection", False)),
        noise_levels=only(classes, "num_class_embeds") if classes else 0,
        cross_only=cross_only(config.get("only_cross_attention", False), depths),
        added_width=only(config[ADDED_KEY], ADDED_KEY) if added else 0,
        size_width=only(config[SIZE_KEY], SIZE_KEY) if added else 0,
    )


def cross_only(value: Any, depths: tuple[int, ...]) -> tuple[bool, ...]:
    """Levels whose transformers attend to the context alone; () where none does."""
    flags = value if isinstance(value, list) else [value] * len(depths)
    # One true for all would go for the middle block too.
    if value is True or len(flags) != len(depths) or not all(type(flag) is bool for flag in flags):
        raise ValueError(
            f"only_cross_attention must be false, or {len(depths)} of true and false, not {value!r}"
        )
    both = tuple(bool(depth and flag) for depth, flag in zip(depths, flags, strict=True))
    return both if any(both) else ()


def plain_unet_spec(config: Config) -> UNetSpec:
    """Of a UNet without a context; attention is not read yet."""
    check_fixed(config, PLAIN_UNET_FIXED)
    channels = widths(config)
    levels = range(len(channels))
    for key, name in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
        if config[key] != [name for _ in levels]:
            raise ValueError(f"{key} must be {name} at each of {len(levels)} levels, not {config[key]!r}")
    return UNetSpec(
        in_channels=only(config["in_channels"], "in_channels"),
        out_channels=only(config["out_channels"], "out_channels"),
        channels=channels,
        res_blocks=only(config.get("layers_per_block", 2), "layers_per_block"),
        transformer_depth=tuple(0 for _ in levels),
        middle_depth=0,
        heads=tuple(1 for _ in levels),
        context_width=0,
        groups=config.get("norm_num_groups", 32),
        noise_levels=only(config["num_class_embeds"], "num_class_embeds")
        if "num_class_embeds" in config
        else 0,
    )


def upscaling_spec(index: Config, path: Path) -> UpscalingSpec:
    """Of a folder whose index may name a schedule for the noise on low-resolution pictures."""
    most = index.get("max_noise_level", MAX_NOISE_LEVEL if index["_class_name"] == UPSCALING else 0)
    if NOISE not in index or not most:
        return UpscalingSpec()
    return UpscalingSpec(read_part(path, NOISE, noise_spec)[1], only(most, "max_noise_level"))


def noise_spec(config: Config) -> ScheduleSpec:
    """Of noise that is put on pictures: what a sampler would cut off does not matter."""
    return schedule_spec(config | {"clip_sample": False, "thresholding": False})


def autoencoder_spec(config: Config) -> AutoencoderSpec:
    check_fixed(config, VAE_FIXED)
    channels = widths(config)
    for key, name in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if config[key] != [name] * len(channels):
            raise ValueError(f"{key} must be {name} at each of {len(channels)} levels, not {config[key]!r}")
    size = config.get("sample_size", 512)
    return AutoencoderSpec(
        channels=channels,
        res_blocks=only(config.get("layers_per_block", 1), "layers_per_block"),
        latent_channels=only(config["latent_channels"], "latent_channels"),
        scale_factor=float(config.get("scaling_factor", 0.18215)),
        image_channels=only(config.get("in_channels", 3), "in_channels"),
        groups=config.get("norm_num_groups", 32),
        sample_size=max(size) if isinstance(size, list) else size,
        patch_size=only(config.get("patch_size", 1), "patch_size"),
        middle_attention=bool(config.get("mid_block_add_attention", True)),
    )


def careful_autoencoder_spec(config: Config) -> AutoencoderSpec:
    """Of pipelines that do not run D in float16 unless its configuration allows it."""
    return replace(autoencoder_spec(config), upcast=bool(config.get("force_upcast", True)))


AUTOENCODERS = dict.fromkeys((UPSCALING, XL, XL_INPAINTING), careful_autoencoder_spec)


def text_spec(config: Config) -> TextSpec:
    check_fixed(config, TEXT_FIXED)
    numbers = {
        "vocabulary": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "intermediate": "intermediate_size",
        "tokens": "max_position_embeddings",
    }
    ids = {"bos_id": "bos_token_id", "eos_id": "eos_token_id", "pad_id": "pad_token_id"}
    given = {field: only(config[key], key) for field, key in numbers.items()}
    given |= {field: config[key] for field, key in ids.items() if config.get(key) is not None}
    if given["width"] % given["heads"]:
        raise ValueError(f"num_attention_heads {given['heads']} does not divide hidden_size {given['width']}")
    if (
        given.get("eos_id") == 2
    ):  # in older files, and `transformers` takes the largest id then: the end token's
        given["eos_id"] = given["vocabulary"] - 1
    return TextSpec(**given, activation=config.get("hidden_act", "quick_gelu"))


def inner_text_spec(config: Config) -> TextSpec:
    """Of a text encoder whose last layer and norm the vectors of the tokens do not go through."""
    return replace(text_spec(config), skipped=1, final_norm=False)


def inner_pooled_text_spec(config: Config) -> TextSpec:
    """Of one that gives a vector of the whole text too."""
    return replace(inner_text_spec(config), pooled=only(config["projection_dim"], "projection_dim"))


def pooled_text_spec(config: Config) -> TextSpec:
    """Of a text encoder that gives one vector a text: its own configuration, or that of a whole CLIP."""
    spec = text_spec(config | config.get("text_config", {}))
    return replace(spec, projection=only(config["projection_dim"], "projection_dim"))


def with_text(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The spec of a single file with the text encoder beside it, where it needs one and one is there."""
    if not spec.lacks_text_encoder or not (folder / "text_encoder").is_dir():
        return spec
    _, text = read_part(folder, "text_encoder", pooled_text_spec)
    if text.projection != spec.unet.context_width:
        raise CheckpointError(
            f"{config_file(folder, 'text_encoder')}: projection_dim is {text.projection}, "
            f"but the UNet expects contexts {spec.unet.context_width} wide"
        )
    # Guidance was published with 0 for no text (Blattmann et al. 2022).
    return replace(spec, texts=(text,), tasks=ALL_TASKS[:3], zero_null=True)


def schedule_spec(config: Config) -> ScheduleSpec:
    ddim = config.get("_class_name") == "DDIMScheduler"
    check_fixed(config, SCHEDULER_FIXED)
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "linspace" and not ddim:
        spacing = "leading"  # what other samplers prefer says nothing about DDIM
    if spacing not in get_args(Spacing):
        raise ValueError(f"timestep_spacing is {spacing!r}; supported are {', '.join(get_args(Spacing))}")
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    if not 0 < start <= end < 1:
        raise ValueError(f"beta_start and beta_end are {start} and {end}; they must rise between 0 and 1")
    timesteps, offset = config.get("num_train_timesteps", 1000), config.get("steps_offset", 0)
    if type(offset) is not int or offset < 0:
        raise ValueError(f"steps_offset must be a whole number from 0, not {offset!r}")
    if only(timesteps, "num_train_timesteps") > MAX_TIMESTEPS:
        raise ValueError(f"num_train_timesteps must be at most {MAX_TIMESTEPS}, not {timesteps}")
    return ScheduleSpec(
        beta_start=start,
        beta_end=end,
        beta_schedule=config.get("beta_schedule", "linear"),
        timesteps=timesteps,
        prediction=config.get("prediction_type", "epsilon"),
        spacing=spacing,
        steps_offset=offset,
        final_alpha_one=bool(config.get("set_alpha_to_one", ddim)),
    )


ADDED_KEY, SIZE_KEY = "projection_class_embeddings_input_dim", "addition_time_embed_dim"
MAX_TIMESTEPS = 2**16
MAX_NOISE_LEVEL = 350  # of the published upscaler, whose index does not always say
READERS = {"UNet2DConditionModel": unet_spec, "UNet2DModel": plain_unet_spec}


def sample_side(config: Config, spec: ModelSpec) -> tuple[int, int]:
    """(width, height) in pixels that the UNet was trained at."""
    size = config.get("sample_size") or spec.autoencoder.sample_size // spec.autoencoder.factor
    height, width = per_level(size, 2, "sample_size")
    return width * spec.autoencoder.factor, height * spec.autoencoder.factor


def check_fit(spec: ModelSpec, path: Path) -> None:
    """Refuse networks that do not fit together."""
    unet, latent = spec.unet, spec.autoencoder.latent_channels
    expected = latent + spec.concat_channels
    if (unet.in_channels, unet.out_channels) != (expected, latent):
        raise CheckpointError(
            f"{path}: the UNet takes {unet.in_channels} and gives {unet.out_channels} channels where "
            f"{expected} and {latent} are expected: the autoencoder has {latent}"
        )
    noise = spec.upscaling and spec.upscaling.noise
    most = spec.upscaling.max_noise_level if noise else 0
    if bool(unet.noise_levels) != bool(noise) or most > max(unet.noise_levels - 1, 0):
        raise CheckpointError(
            f"{path}: the UNet knows {unet.noise_levels} noise levels; max_noise_level is {most}"
        )
    pooled = sum(text.pooled for text in spec.texts)
    if unet.added_width != (expected := pooled + XL_SIZES * unet.size_width):
        raise CheckpointError(
            f"{path}: the UNet takes {unet.added_width} numbers beside the timestep, which "
            f"projection_class_embeddings_input_dim says; from text and sizes there are {expected}"
        )
    if spec.texts and unet.context_width != (
        width := sum(text.projection or text.width for text in spec.texts)
    ):
        raise CheckpointError(
            f"{path}: the UNet expects contexts {unet.context_width} wide, the text encoders make {width}"
        )


def with_own_inputs(spec: ModelSpec, path: Path) -> ModelSpec:
    """The spec with the tasks, labels and layout channels of the folder's own file, where it has one."""
    file = path / OWN_FILE
    own = read_json(file) if file.exists() else {}
    channels, labels = own.get("layout_channels", 0), own.get("labels", [])
    tasks = own.get("tasks", list(spec.tasks))
    if type(channels) is not int or not 0 <= channels <= 1024:
        raise CheckpointError(f"{file}: layout_channels must be a whole number from 0 to 1024")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{file}: labels must be a list of texts")
    if not isinstance(tasks, list) or not all(task in ALL_TASKS for task in tasks):
        raise CheckpointError(f"{file}: tasks must be a list of {', '.join(ALL_TASKS)}")
    residual = own.get(RESIDUAL, False)
    if type(residual) is not bool or (residual and not spec.upscaling):
        raise CheckpointError(f"{file}: {RESIDUAL} must be true or false, and is for upscalers")
    if residual:
        spec = replace(spec, upscaling=replace(spec.upscaling, residual=True))
    return replace(spec, layout_channels=channels, labels=tuple(labels), tasks=tuple(tasks))


def with_own_file(spec: ModelSpec, path: Path) -> ModelSpec:
    """The spec with the name and the defaults of the folder's own file, where it has one."""
    file = path / OWN_FILE
    if not file.exists():
        return spec
    own = read_json(file)
    values, name = own.get("defaults", {}), own.get("name", spec.name)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: defaults must be an object")
    known = {f.name: type(getattr(spec.defaults, f.name)) for f in fields(Defaults)}
    accepted = (*OWN_KEYS, RESIDUAL, single_file.OWN_KEY)
    for key in [k for k in own if k not in accepted] + [k for k in values if k not in known]:
        raise CheckpointError(f"{file}: {key!r} is unknown; defaults may hold {', '.join(known)}")
    for key, value in values.items():
        accepted = (int, float) if known[key] is float else known[key]
        if isinstance(value, bool) or not isinstance(value, accepted):
            raise CheckpointError(f"{file}: {key} must be {known[key].__name__}, not {value!r}")
    for key in ("width", "height"):
        value = values.get(key, spec.size_multiple)
        if value < 1 or value % spec.size_multiple:
            raise CheckpointError(f"{file}: {key} must be a multiple of {spec.size_multiple}, not {value}")
    return replace(spec, name=str(name), defaults=replace(spec.defaults, **values))


def write_configs(spec: ModelSpec, path: Path) -> None:
    """Write every configuration file of the layout, in the form that diffusers reads."""
    pipeline = pipeline_of(spec)
    parts = {
        "unet": unet_config(spec) if spec.texts else plain_unet_config(spec),
        "vqvae" if "vqvae" in PIPELINES[pipeline] else "vae": autoencoder_config(spec.autoencoder),
        SCHEDULER: schedule_config(spec.schedule),
    }
    parts |= {part: text_config(text) for part, text in zip(TEXT_ENCODERS, spec.texts, strict=False)}
    if spec.upscaling and spec.upscaling.noise:
        parts[NOISE] = schedule_config(spec.upscaling.noise) | {"_class_name": noise_class(pipeline)}
    residual = {RESIDUAL: True} if spec.upscaling and spec.upscaling.residual else {}
    files = {config_file(path, part): config for part, config in parts.items()} | {
        path / "model_index.json": index_config(pipeline, spec),
        path / OWN_FILE: {key: asdict(spec)[key] for key in OWN_KEYS} | residual,
    }
    for file, config in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def pipeline_of(spec: ModelSpec) -> str:
    """The diffusers pipeline that runs such a model."""
    if spec.upscaling:
        return UPSCALING if spec.texts else SUPER_RESOLUTION
    if len(spec.texts) > 1:
        return XL_INPAINTING if spec.mask_channels else XL
    return INPAINTING if spec.mask_channels else PLAIN


def noise_class(pipeline: str) -> str:
    """The scheduler of the noise on low-resolution pictures."""
    return "DDPMScheduler" if pipeline == UPSCALING else "DDIMScheduler"


def index_config(pipeline: str, spec: ModelSpec) -> Config:
    upscaling = spec.upscaling
    parts = {part: LIBRARIES.get(part, "diffusers") for part in PIPELINES[pipeline]}
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.36.0",
        **{part: [library, PIPELINES[pipeline][part]] for part, library in parts.items()},
        SCHEDULER: ["diffusers", "DDIMScheduler"],
    }
    if upscaling and upscaling.noise:
        index |= {
            NOISE: ["diffusers", noise_class(pipeline)], "max_noise_level": upscaling.max_noise_level
        }  # fmt: skip
    if pipeline in (PLAIN, INPAINTING):
        index |= {"requires_safety_checker": False}
    if pipeline in (XL, XL_INPAINTING):
        index |= {"force_zeros_for_empty_prompt": spec.zero_null}
    return index | {part: [None, None] for part in EMPTY[pipeline]}


def sample_size(spec: ModelSpec) -> int | list[int]:
    """Cells of a side of what the UNet was trained on: one number where they are equal, which some pipelines
    compare with another."""
    sides = [side // spec.autoencoder.factor for side in (spec.defaults.height, spec.defaults.width)]
    return sides[0] if sides[0] == sides[1] else sides


def plain_unet_config(spec: ModelSpec) -> Config:
    """Of a UNet without a context. Raises CheckpointError for one that attends."""
    unet = spec.unet
    if unet.middle_depth or any(unet.transformer_depth):
        raise CheckpointError("a UNet with attention but no context cannot be written in this layout yet")
    levels = len(unet.channels)
    config = {option: accepted[0] for option, accepted in PLAIN_UNET_FIXED.items()} | {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.36.0",
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


def unet_config(spec: ModelSpec) -> Config:
    """Raises CheckpointError for a middle block that the layout has no words for."""
    unet = spec.unet
    if not unet.middle_depth or unet.transformer_depth[-1] not in (0, unet.middle_depth):
        raise CheckpointError(
            "this layout cannot say that the middle block's transformer is not as deep as the last level's"
        )
    depth = [d or unet.middle_depth for d in unet.transformer_depth]
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in unet.transformer_depth]
    up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(unet.transformer_depth)]
    return (
        {option: accepted[0] for option, accepted in UNET_FIXED.items()}
        | {
            "_class_name": WITH_TEXT["unet"],
            "_diffusers_version": "0.36.0",
            "sample_size": sample_size(spec),
            "in_channels": unet.in_channels,
            "out_channels": unet.out_channels,
            "block_out_channels": list(unet.channels),
            "down_block_types": down,
            "up_block_types": up,
            "layers_per_block": unet.res_blocks,
            "transformer_layers_per_block": depth,
            "attention_head_dim": list(unet.heads),
            "cross_attention_dim": unet.context_width,
            "norm_num_groups": unet.groups,
            "use_linear_projection": unet.linear_projection,
            "only_cross_attention": list(unet.cross_only) or False,
            "num_class_embeds": unet.noise_levels or None,
        }
        | (
            {"addition_embed_type": "text_time", ADDED_KEY: unet.added_width, SIZE_KEY: unet.size_width}
            if unet.added_width
            else {}
        )
    )


def autoencoder_config(spec: AutoencoderSpec) -> Config:
    levels = len(spec.channels)
    # diffusers' class has no patches; the option is called as in its autoencoders that have them.
    patches = {"patch_size": spec.patch_size} if spec.patch_size > 1 else {}
    return (
        {option: accepted[0] for option, accepted in VAE_FIXED.items()}
        | patches
        | {
            "_class_name": WITH_TEXT["vae"],
            "_diffusers_version": "0.36.0",
            "in_channels": spec.image_channels,
            "out_channels": spec.image_channels,
            "block_out_channels": list(spec.channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": spec.res_blocks,
            "latent_channels": spec.latent_channels,
            "norm_num_groups": spec.groups,
            "sample_size": spec.sample_size,
            "scaling_factor": spec.scale_factor,
            "mid_block_add_attention": spec.middle_attention,
            "force_upcast": spec.upcast,
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
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.36.0",
        "beta_start": spec.beta_start,
        "beta_end": spec.beta_end,
        "beta_schedule": spec.beta_schedule,
        "num_train_timesteps": spec.timesteps,
        "prediction_type": spec.prediction,
        "timestep_spacing": spec.spacing,
        "steps_offset": spec.steps_offset,
        "set_alpha_to_one": spec.final_alpha_one,
        "clip_sample": False,
    }

"""Reads the configuration files of a diffusers folder into a ModelSpec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from models.errors import CheckpointError
from models.formats import edm, few_step
from models.formats.config_files import Config, read_json, shortened
from models.formats.diffusers_tables import (
    ADDED_KEY,
    EDITING,
    HAS_ATTENTION,
    INDEX_FILE,
    INPAINTING,
    NOISE_SCHEDULER,
    PIPELINES,
    PLAIN_UNET_FIXED,
    SAME_NETWORKS,
    SCHEDULER,
    SCHEDULER_FIXED,
    SIZE_KEY,
    SUPER_RESOLUTION,
    TEXT_ENCODERS,
    TEXT_FIXED,
    UNET_FIXED,
    UPSCALING,
    VAE_FIXED,
    XL,
    XL_EDITING,
    XL_INPAINTING,
    XL_REFINER,
    Accepted,
)
from models.spec import (
    ALL_TASKS,
    AutoencoderSpec,
    Defaults,
    ModelSpec,
    ScheduleSpec,
    TextSpec,
    TimestepSpacing,
    UNetSpec,
    UpscalingSpec,
)

MAX_NUMBER = 2**31  # of any option with a whole number
MAX_TIMESTEPS = 2**16
MAX_LAYERS = 256  # of options that count layers; reading a folder takes time for each
LAYER_COUNTS = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
    "num_res_blocks",
    "num_trans_layer",
)
TASKS = {  # of pipelines with other tasks than Stable Diffusion's; those of upscalers are theirs
    XL_REFINER: ALL_TASKS[1:3],
    EDITING: ("image-to-image",),
    XL_EDITING: ("image-to-image",),
}
MAX_NOISE_LEVEL = 350  # of the published upscaler, for folders that do not contain it

Spec = TypeVar("Spec")


def read_folder(path: Path) -> ModelSpec:
    """The spec of the model in a diffusers folder, from its published configuration files.

    Raises CheckpointError, naming the file and the option.
    """
    index = read_index(path)
    pipeline = index["_class_name"]
    classes = PIPELINES[pipeline]
    config = read_json(config_file(path, "unet"))
    unet = translated(config_file(path, "unet"), UNETS[classes["unet"]], config)
    read_autoencoder = AUTOENCODERS.get(pipeline, autoencoder_spec)
    autoencoder = read_part(path, autoencoder_folder(path).name, read_autoencoder)
    upscaling = None
    if pipeline in (SUPER_RESOLUTION, UPSCALING):
        upscaling = translated(path / INDEX_FILE, lambda values: upscaling_spec(values, path), index)
    texts = text_specs(path, pipeline)
    schedule = read_part(path, SCHEDULER, schedule_spec)
    autoencoder = replace(autoencoder, scale_factor=autoencoder.scale_factor / schedule.sigma_data)
    size = translated(config_file(path, "unet"), lambda values: default_size(values, autoencoder), config)
    spec = ModelSpec(
        name=path.resolve().name,
        unet=unet,
        autoencoder=autoencoder,
        schedule=schedule,
        texts=texts,
        defaults=defaults_of(size, texts, upscaling),
        upscaling=upscaling,
        # Inpainting pipelines also accept a UNet without mask channels.
        mask_channels=pipeline in (INPAINTING, XL_INPAINTING)
        and unet.in_channels != autoencoder.latent_channels,
        edits=pipeline in (EDITING, XL_EDITING),
        tasks=("upscaling",) if upscaling else TASKS.get(pipeline, ALL_TASKS[:3]),
        aesthetic_score=pipeline == XL_REFINER,
        zero_null="text_encoder_2" in classes and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    if index.get("is_cosxl_edit") and not schedule.sigma_range:
        raise CheckpointError(f"{path / INDEX_FILE}: is_cosxl_edit needs a scheduler of noise levels (EDM)")
    return edm.with_levels(spec, schedule) if schedule.sigma_range else spec


def names_in_folder(path: Path) -> list[tuple[str, str]]:
    """(origin, name) of what a folder's files say that the model is, for models.formats.few_step."""
    scheduler = read_json(config_file(path, SCHEDULER)).get("_class_name")
    names = [(f"{SCHEDULER}/scheduler_config.json", few_step.SCHEDULERS.get(str(scheduler)))]
    for file in (path / INDEX_FILE, config_file(path, "unet")):
        names.append((f"_name_or_path in {file.name}", read_json(file).get("_name_or_path")))
    return [(origin, name) for origin, name in names if isinstance(name, str)]


def text_specs(path: Path, pipeline: str) -> tuple[TextSpec, ...]:
    """Specs of the text encoders in a folder."""
    readers: dict[str, Callable[[Config], TextSpec]] = {}
    if pipeline in (XL, XL_INPAINTING, XL_EDITING):
        readers = dict(zip(TEXT_ENCODERS, (inner_text_spec, inner_pooled_text_spec), strict=True))
    elif pipeline == XL_REFINER:
        readers = {TEXT_ENCODERS[1]: inner_pooled_text_spec}
    elif "text_encoder" in PIPELINES[pipeline]:
        readers = {"text_encoder": text_spec}
    return tuple(read_part(path, part, reader) for part, reader in readers.items())


def defaults_of(
    size: tuple[int, int], texts: tuple[TextSpec, ...], upscaling: UpscalingSpec | None
) -> Defaults:
    """Defaults of a model without an ldm.json. size: (width, height) in pixels."""
    width, height = size
    if not texts:
        return Defaults(width, height, guidance_scale=1.0)
    if upscaling:
        level = min(20, upscaling.max_noise_level)
        return Defaults(width, height, guidance_scale=9.0, noise_level=level)
    return Defaults(width, height)


def config_file(path: Path, part: str) -> Path:
    """The configuration of a part of a folder."""
    scheduler = part in (SCHEDULER, NOISE_SCHEDULER)
    return path / part / ("scheduler_config.json" if scheduler else "config.json")


def read_part(path: Path, part: str, reader: Callable[[Config], Spec]) -> Spec:
    """The spec that `reader` returns for the configuration of a part. Raises CheckpointError."""
    file = config_file(path, part)
    return translated(file, reader, read_json(file))


def autoencoder_folder(path: Path) -> Path:
    """The folder of the autoencoder, which has one of two names."""
    return path / ("vqvae" if (path / "vqvae").is_dir() else "vae")


def translated(file: Path, reader: Callable[[Config], Spec], config: Config) -> Spec:
    """reader(config). Its errors become a CheckpointError that names the file."""
    try:
        return reader(config)
    except KeyError as error:
        raise CheckpointError(f"{file}: {error} is missing") from error
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def read_index(path: Path) -> Config:
    """The index of a folder, with the pipeline in PIPELINES that has the same networks.

    Raises CheckpointError if it names an unsupported pipeline or part.
    """
    file = path / INDEX_FILE
    index = read_json(file)
    pipeline = index.get("_class_name")
    pipeline = SAME_NETWORKS.get(pipeline, pipeline) if isinstance(pipeline, str) else pipeline
    if pipeline in (XL, XL_INPAINTING) and index.get("requires_aesthetics_score"):
        pipeline = XL_REFINER
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise CheckpointError(
            f"{file}: pipeline {shortened(pipeline)} is not supported; supported are {', '.join(PIPELINES)}"
        )
    for part, expected in PIPELINES[pipeline].items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found not in (expected, expected + "Fast"):
            raise CheckpointError(f"{file}: {part} is {shortened(found)}; supported is {expected}")
    return index | {"_class_name": pipeline}


def check_fixed(config: Config, fixed: Accepted) -> None:
    """Raise ValueError for an option with a value that is not supported."""
    for option, accepted in fixed.items():
        value = config.get(option, accepted[0])
        values = value if isinstance(value, list) and value else [None if value == [] else value]
        if not all(each in accepted for each in values):
            raise ValueError(
                f"{option} is {shortened(value)}, which is not supported; expected {accepted[0]!r}"
            )


def per_level(value: Any, levels: int, name: str) -> tuple[int, ...]:
    """One number for each level, from a number for all or a list of them."""
    values = tuple(value) if isinstance(value, list) else (value,) * levels
    if len(values) != levels or not all(type(v) is int and 0 < v < MAX_NUMBER for v in values):
        raise ValueError(f"{name} must be a positive integer, or {levels} of them, not {shortened(value)}")
    if name in LAYER_COUNTS and max(values, default=0) > MAX_LAYERS:
        raise ValueError(f"{name} must be at most {MAX_LAYERS}, not {shortened(value)}")
    return values


def only(value: Any, name: str) -> int:
    """One positive integer, or a list that repeats it."""
    values = set(per_level(value, len(value) if isinstance(value, list) else 1, name))
    if len(values) != 1:
        raise ValueError(f"{name} must be the same at every level, not {shortened(value)}")
    return values.pop()


def level_widths(config: Config) -> tuple[int, ...]:
    """Channels of each level, which must be multiples of the norms' groups."""
    value, groups = config["block_out_channels"], only(config.get("norm_num_groups", 32), "norm_num_groups")
    channels = per_level(value, len(value) if isinstance(value, list) and value else 1, "block_out_channels")
    if any(width % groups for width in channels):
        raise ValueError(
            f"block_out_channels {shortened(value)} must be multiples of norm_num_groups, {groups}"
        )
    return channels


def levels_with_attention(config: Config, key: str, levels: int) -> list[bool]:
    """Which levels have attention, by the names of their blocks."""
    names = config[key]
    unknown = [name for name in names if not isinstance(name, str) or name not in HAS_ATTENTION]
    if unknown:
        raise ValueError(f"{key} has {shortened(unknown[0])}; supported are {', '.join(HAS_ATTENTION)}")
    if len(names) != levels:
        raise ValueError(f"{key} must name {levels} blocks, not {len(names)}")
    return [HAS_ATTENTION[name] for name in names]


def unet_spec(config: Config) -> UNetSpec:
    check_fixed(config, UNET_FIXED)
    channels = level_widths(config)
    levels = len(channels)
    down = levels_with_attention(config, "down_block_types", levels)
    if levels_with_attention(config, "up_block_types", levels) != down[::-1]:
        raise ValueError("up_block_types must have attention at the same levels as down_block_types")
    # Despite its name, this option holds the number of heads in all published models.
    heads = per_level(config.get("attention_head_dim", 8), levels, "attention_head_dim")
    for width, count in zip(channels, heads, strict=True):
        if width % count:
            raise ValueError(f"attention_head_dim {count} (heads) does not divide {width} channels")
    res_blocks = only(config.get("layers_per_block", 2), "layers_per_block")
    depth, up_depths = transformer_depths(config, down, res_blocks)
    depths = tuple(d if attention else 0 for d, attention in zip(depth, down, strict=True))
    middle = MIDDLE_RES_BLOCKS[config.get("mid_block_type", "UNetMidBlock2DCrossAttn")]
    classes, added = config.get("num_class_embeds"), config.get("addition_embed_type") is not None
    guidance = config.get("time_cond_proj_dim")
    return UNetSpec(
        in_channels=only(config["in_channels"], "in_channels"),
        out_channels=only(config["out_channels"], "out_channels"),
        channels=channels,
        res_blocks=res_blocks,
        transformer_depth=depths,
        middle_depth=depth[-1] if middle == 2 else 0,
        heads=heads,
        context_width=only(config["cross_attention_dim"], "cross_attention_dim"),
        groups=only(config.get("norm_num_groups", 32), "norm_num_groups"),
        linear_projection=bool(config.get("use_linear_projection", False)),
        noise_levels=only(classes, "num_class_embeds") if classes else 0,
        up_depths=up_depths,
        middle_res_blocks=middle,
        cross_only=cross_only(config.get("only_cross_attention", False), depths),
        added_width=only(config[ADDED_KEY], ADDED_KEY) if added else 0,
        size_width=only(config[SIZE_KEY], SIZE_KEY) if added else 0,
        guidance_width=only(guidance, "time_cond_proj_dim") if guidance else 0,
    )


def transformer_depths(
    config: Config, attends: list[bool], res_blocks: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Of each level going down, and of each residual block of each level going up, finest level first; () if
    these are the same."""
    levels, down_key = len(attends), "transformer_layers_per_block"
    value = config.get(down_key, 1)
    if isinstance(value, list):  # of a level: a number, or one for each residual block
        value = [only(each, down_key) for each in value]
    down = per_level(value, levels, down_key)
    up_key = "reverse_" + down_key
    reverse = config.get(up_key)
    if reverse is None:
        return down, ()
    if not isinstance(reverse, list) or len(reverse) != levels:
        raise ValueError(f"{up_key} must be a list of {levels} levels, not {shortened(reverse)}")
    up = tuple(
        per_level(each, res_blocks + 1, up_key) if attention else (0,) * (res_blocks + 1)
        for each, attention in zip(reversed(reverse), attends, strict=True)
    )
    same = tuple((d * attention,) * (res_blocks + 1) for d, attention in zip(down, attends, strict=True))
    return down, () if up == same else up


def cross_only(value: Any, depths: tuple[int, ...]) -> tuple[bool, ...]:
    """Levels whose transformers attend to the context only; () if there are none."""
    flags = value if isinstance(value, list) else [value] * len(depths)
    # A single true would apply to the middle block too.
    if value is True or len(flags) != len(depths) or not all(type(flag) is bool for flag in flags):
        raise ValueError(
            f"only_cross_attention must be false, or {len(depths)} of true and false, not {shortened(value)}"
        )
    both = tuple(bool(depth and flag) for depth, flag in zip(depths, flags, strict=True))
    return both if any(both) else ()


def plain_unet_spec(config: Config) -> UNetSpec:
    """Spec of a UNet without a context; attention is not supported in it."""
    check_fixed(config, PLAIN_UNET_FIXED)
    channels = level_widths(config)
    check_blocks(config, len(channels), down="DownBlock2D", up="UpBlock2D")
    levels = range(len(channels))
    classes = config.get("num_class_embeds")
    return UNetSpec(
        in_channels=only(config["in_channels"], "in_channels"),
        out_channels=only(config["out_channels"], "out_channels"),
        channels=channels,
        res_blocks=only(config.get("layers_per_block", 2), "layers_per_block"),
        transformer_depth=tuple(0 for _ in levels),
        middle_depth=0,
        heads=tuple(1 for _ in levels),
        context_width=0,
        groups=only(config.get("norm_num_groups", 32), "norm_num_groups"),
        noise_levels=0 if classes is None else only(classes, "num_class_embeds"),
    )


def check_blocks(config: Config, levels: int, **names: str) -> None:
    """Raise ValueError unless the blocks of every level have the names given for `down` and `up`."""
    for side, name in names.items():
        key = f"{side}_block_types"
        if config[key] != [name] * levels:
            raise ValueError(f"{key} must be {name} at each of {levels} levels, not {shortened(config[key])}")


def upscaling_spec(index: Config, path: Path) -> UpscalingSpec:
    """Spec of an upscaler, whose folder may have a schedule for the noise on low-resolution images."""
    default = MAX_NOISE_LEVEL if index["_class_name"] == UPSCALING else 0
    max_noise_level = index.get("max_noise_level", default)
    if NOISE_SCHEDULER not in index or not max_noise_level:
        return UpscalingSpec()
    noise = read_part(path, NOISE_SCHEDULER, noise_spec)
    return UpscalingSpec(noise, only(max_noise_level, "max_noise_level"))


def noise_spec(config: Config) -> ScheduleSpec:
    """Schedule of noise that is only added, so that clipping options for sampling do not matter."""
    return schedule_spec(config | {"clip_sample": False, "thresholding": False})


def autoencoder_spec(config: Config) -> AutoencoderSpec:
    check_fixed(config, VAE_FIXED)
    channels = level_widths(config)
    check_blocks(config, len(channels), down="DownEncoderBlock2D", up="UpDecoderBlock2D")
    size, scale = config.get("sample_size", 512), config.get("scaling_factor", 0.18215)
    if type(scale) not in (int, float) or not 0 < scale < MAX_NUMBER:
        raise ValueError(f"scaling_factor must be a positive number, not {shortened(scale)}")
    return AutoencoderSpec(
        channels=channels,
        res_blocks=only(config.get("layers_per_block", 1), "layers_per_block"),
        latent_channels=only(config["latent_channels"], "latent_channels"),
        scale_factor=float(scale),
        image_channels=only(config.get("in_channels", 3), "in_channels"),
        groups=only(config.get("norm_num_groups", 32), "norm_num_groups"),
        sample_size=max(per_level(size, len(size) if isinstance(size, list) and size else 1, "sample_size")),
        patch_size=only(config.get("patch_size", 1), "patch_size"),
        middle_attention=bool(config.get("mid_block_add_attention", True)),
        latents_mean=statistics(config).get("latents_mean", ()),
        latents_std=statistics(config).get("latents_std", ()),
    )


def statistics(config: Config) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each channel of the latents, if a configuration has them."""
    found = {key: config[key] for key in ("latents_mean", "latents_std") if config.get(key) is not None}
    for key, values in found.items():
        valid = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if len(found) != 2 or not valid or len(values) != config["latent_channels"]:
            raise ValueError(f"{key} must be a number for each channel, not {shortened(values)}")
        if key == "latents_std" and min(values) <= 0:
            raise ValueError("latents_std must be above 0")
    return {key: tuple(map(float, values)) for key, values in found.items()}


def upcast_autoencoder_spec(config: Config) -> AutoencoderSpec:
    """Spec for pipelines that run the decoder in float16 only if its configuration allows it."""
    return replace(autoencoder_spec(config), upcast=bool(config.get("force_upcast", True)))


def text_spec(config: Config) -> TextSpec:
    check_fixed(config, TEXT_FIXED)
    ids = {
        field: config[key]
        for field, key in (("bos_id", "bos_token_id"), ("eos_id", "eos_token_id"), ("pad_id", "pad_token_id"))
        if config.get(key) is not None
    }
    for field, value in ids.items():
        if type(value) is not int or not 0 <= value < MAX_NUMBER:
            raise ValueError(f"{field} must be a token id, not {shortened(value)}")
    width, heads = (only(config[key], key) for key in ("hidden_size", "num_attention_heads"))
    vocabulary = only(config["vocab_size"], "vocab_size")
    if width % heads:
        raise ValueError(f"num_attention_heads {heads} does not divide hidden_size {width}")
    # Older files have a wrong 2 here, for which `transformers` takes the largest id, that of the end token.
    if ids.get("eos_id") == 2:
        ids["eos_id"] = vocabulary - 1
    return TextSpec(
        vocabulary=vocabulary,
        width=width,
        layers=only(config["num_hidden_layers"], "num_hidden_layers"),
        heads=heads,
        intermediate=only(config["intermediate_size"], "intermediate_size"),
        tokens=only(config["max_position_embeddings"], "max_position_embeddings"),
        activation=config.get("hidden_act", "quick_gelu"),
        **ids,
    )


def inner_text_spec(config: Config) -> TextSpec:
    """Spec of a text encoder whose token vectors skip the last layer and the final norm."""
    return replace(text_spec(config), skipped=1, final_norm=False)


def inner_pooled_text_spec(config: Config) -> TextSpec:
    """The same, with a pooled vector of the text."""
    return replace(inner_text_spec(config), pooled=only(config["projection_dim"], "projection_dim"))


def pooled_text_spec(config: Config) -> TextSpec:
    """Spec of a text encoder whose output is one projected vector per text.

    The configuration may be that of a complete CLIP.
    """
    spec = text_spec(config | config.get("text_config", {}))
    return replace(spec, projection=only(config["projection_dim"], "projection_dim"))


def schedule_spec(config: Config) -> ScheduleSpec:
    if edm.is_edm(config):
        return edm.schedule_of_config(config)
    ddim = config.get("_class_name") == "DDIMScheduler"
    check_fixed(config, SCHEDULER_FIXED)
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "linspace" and not ddim:
        spacing = "leading"  # another scheduler's choice, which DDIM does not share
    if spacing not in get_args(TimestepSpacing):
        supported = ", ".join(get_args(TimestepSpacing))
        raise ValueError(f"timestep_spacing is {shortened(spacing)}; supported are {supported}")
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    if not 0 < start <= end < 1:
        raise ValueError(f"beta_start and beta_end are {start} and {end}; they must rise between 0 and 1")
    timesteps, offset = config.get("num_train_timesteps", 1000), config.get("steps_offset", 0)
    if type(offset) is not int or not 0 <= offset < MAX_NUMBER:
        raise ValueError(f"steps_offset must be a whole number from 0, not {shortened(offset)}")
    timesteps = only(timesteps, "num_train_timesteps")
    if timesteps > MAX_TIMESTEPS:
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
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )


def default_size(config: Config, autoencoder: AutoencoderSpec) -> tuple[int, int]:
    """(width, height) in pixels that the UNet was trained at."""
    size = config.get("sample_size") or autoencoder.sample_size // autoencoder.factor
    height, width = per_level(size, 2, "sample_size")
    return width * autoencoder.factor, height * autoencoder.factor


MIDDLE_RES_BLOCKS = {"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}
UNETS: dict[str, Callable[[Config], UNetSpec]] = {
    "UNet2DConditionModel": unet_spec,
    "UNet2DModel": plain_unet_spec,
}
AUTOENCODERS = dict.fromkeys((UPSCALING, XL, XL_INPAINTING, XL_EDITING, XL_REFINER), upcast_autoencoder_spec)

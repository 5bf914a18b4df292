"""The YAML files of the CompVis code, which say of a single file what its tensors cannot. Free of torch.

Only numbers are taken from them; the classes that they name are never looked up. Where one speaks of what the
tensors show too, it must agree with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.errors import CheckpointError
from models.formats.config_files import Config, read_yaml
from models.formats.ldm import Said
from models.spec import (
    AutoencoderSpec,
    ClassSpec,
    Condition,
    ModelSpec,
    Prediction,
    ScheduleSpec,
    TokenSpec,
    UNetSpec,
)

SUFFIXES = (".yaml", ".yml")
WEIGHTS = (".ckpt", ".safetensors", ".pt", ".pth")
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}  # CompVis's words -> ours
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}  # what SDXL's code calls them -> CompVis's words
START, END = 0.0001, 0.02  # betas where a file has only one of them


def find(file: Path) -> Path | None:
    """The YAML file of a single file: of the same stem, or the folder's only one that is no other's."""
    found = sorted(path for path in file.parent.glob("*") if path.suffix in SUFFIXES and path.is_file())
    for path in found:
        if path.stem == file.stem:
            return path
    others = {path.stem for path in file.parent.glob("*") if path.suffix in WEIGHTS} - {file.stem}
    if len(found) != 1 or found[0].stem in others or not isinstance(read_yaml(found[0]).get("model"), dict):
        return None
    return found[0]


def params(config: Config, file: Path, *path: str) -> Config:
    """The `params` below a path of names; empty where there are none. Raises CheckpointError."""
    value: Any = config
    for key in path:
        value = value.get(key, {})
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: {key} must be an object, not {value!r}")
    return value


def model_params(config: Config, file: Path) -> Config:
    """Of the model. Raises CheckpointError for a file of another form."""
    if not isinstance(config.get("model"), dict) or not isinstance(config["model"].get("params"), dict):
        raise CheckpointError(f"{file} has no model.params, as CompVis's configurations have")
    return config["model"]["params"]


def said(config: Config, file: Path) -> Said:
    """What it says that no tensor does. Raises CheckpointError, naming the option."""
    model = model_params(config, file)
    unet = unet_params(model, file)
    stage = params(model, file, "first_stage_config", "params", "ddconfig")
    width, mult = unet.get("num_head_channels", -1), stage.get("ch_mult")
    scale = None if model.get("scale_by_std") else model.get("scale_factor")
    side = model.get("image_size", unet.get("image_size"))
    factor = 2 ** (len(mult) - 1) if isinstance(mult, list) and 0 < len(mult) < 16 else None
    alone = "ddconfig" in model
    if alone:
        side, factor = params(model, file, "ddconfig").get("resolution"), 1
    by_heads, heads = width in (-1, None), unet.get("num_heads", -1)
    return Said(
        side=None if side is None or factor is None else whole(side, "image_size", file) * factor,
        heads=whole(heads, "num_heads", file) if by_heads and heads not in (-1, None) else None,
        head_width=None if by_heads else whole(width, "num_head_channels", file),
        scale_factor=None if scale is None else positive(scale, "scale_factor", file),
        schedule=None if alone else schedule(model, file),
        prediction=None if alone else prediction(model, file),
    )


def unet_params(model: Config, file: Path) -> Config:
    """Of the UNet, which SDXL's files call the network."""
    return params(model, file, "unet_config" if "unet_config" in model else "network_config", "params")


def prediction(model: Config, file: Path) -> Prediction | None:
    """What the UNet predicts: CompVis's code takes eps where a whole configuration does not say.

    None where it describes no UNet and does not say.
    """
    scaling = params(model, file, "denoiser_config", "params", "scaling_config").get("target", "EpsScaling")
    told = SCALINGS[known("scaling_config", str(scaling).rpartition(".")[2], SCALINGS, file)]
    if (
        "parameterization" not in model
        and not {"linear_start", "unet_config", "network_config"} & model.keys()
    ):
        return None
    return PREDICTIONS[known("parameterization", model.get("parameterization", told), PREDICTIONS, file)]


def known(option: str, value: Any, words: Mapping[str, str], file: Path) -> str:
    """The value, if it is one of these words."""
    if not isinstance(value, str) or value not in words:
        raise CheckpointError(f"{file}: {option} is {value!r}; supported are {', '.join(words)}")
    return value


def schedule(model: Config, file: Path) -> ScheduleSpec | None:
    """None where there is not a word about it."""
    if not {"linear_start", "linear_end"} & model.keys():
        return None
    kind = known("beta_schedule", model.get("beta_schedule", "linear"), SCHEDULES, file)
    start, end = (
        positive(model.get(option, default), option, file)
        for option, default in (("linear_start", START), ("linear_end", END))
    )
    if end >= 1 or start > end:
        raise CheckpointError(f"{file}: linear_start and linear_end are {start} and {end}")
    return ScheduleSpec(
        beta_start=start,
        beta_end=end,
        beta_schedule=SCHEDULES[kind],
        timesteps=whole(model.get("timesteps", 1000), "timesteps", file),
    )


def whole(value: Any, option: str, file: Path) -> int:
    """A whole number of a size that makes sense."""
    if type(value) is not int or not 1 <= value <= 2**16:
        raise CheckpointError(f"{file}: {option} must be a whole number from 1 to {2**16}, not {value!r}")
    return value


def positive(value: Any, option: str, file: Path) -> float:
    """A number; as a text too, which YAML makes of 1e-4."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise CheckpointError(f"{file}: {option} must be a number above 0, not {value!r}")
    return number


def check(config: Config, spec: ModelSpec, file: Path) -> None:
    """Raise CheckpointError, naming the option, where it contradicts the weights."""
    for option, claimed, actual in claims(config, spec, file):
        claimed = tuple(claimed) if isinstance(claimed, list) else claimed
        if claimed != actual:
            raise CheckpointError(f"{file}: {option} is {claimed!r}, but the weights have {actual!r}")


def claims(config: Config, spec: ModelSpec, file: Path) -> Iterator[tuple[str, Any, Any]]:
    """Option, what it is, and what the weights show, of each that both speak of."""
    model = model_params(config, file)
    if not spec.unet:
        yield from stage_claims(model, spec.autoencoder, file)
        return
    stage = params(model, file, "first_stage_config", "params")
    condition = params(model, file, "cond_stage_config", "params") if spec.condition else {}
    yield from given({"channels": spec.autoencoder.latent_channels}, model)
    yield from unet_claims(unet_params(model, file), spec.unet)
    yield from stage_claims(stage, spec.autoencoder, file)
    yield from given(condition_facts(spec.condition), condition)


def given(facts: Config, options: Config) -> Iterator[tuple[str, Any, Any]]:
    return ((name, options[name], fact) for name, fact in facts.items() if options.get(name) is not None)


def unet_claims(options: Config, unet: UNetSpec) -> Iterator[tuple[str, Any, Any]]:
    facts = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.channels[0] // first(options.get("channel_mult")),
        "num_res_blocks": unet.res_blocks,
        "use_scale_shift_norm": unet.scale_shift_norm,
        "resblock_updown": unet.residual_resampling,
        "use_spatial_transformer": unet.context_width > 0,
    }
    if unet.added_width:
        facts["adm_in_channels"] = unet.added_width
    if unet.noise_levels:
        facts["num_classes"] = unet.noise_levels
    if unet.context_width:
        facts |= {"context_dim": unet.context_width, "use_linear_in_transformer": unet.linear_projection}
        yield from depth_claims(options.get("transformer_depth"), unet)
    yield from given(facts, options)
    yield from levels("channel_mult", options.get("channel_mult"), unet.channels)
    factors = options.get("attention_resolutions")
    if isinstance(factors, list):
        attends = [2**level for level, depth in enumerate(unet.transformer_depth) if depth]
        there = sorted({f for f in factors if type(f) is int and f <= unet.factor})
        yield "attention_resolutions", there, tuple(attends)


def depth_claims(claimed: Any, unet: UNetSpec) -> Iterator[tuple[str, Any, Any]]:
    """Of all levels at once, or of each; a level without attention has none, whatever is said."""
    if isinstance(claimed, list) and len(claimed) == len(unet.transformer_depth):
        actual = [depth or said for depth, said in zip(unet.transformer_depth, claimed, strict=True)]
        yield "transformer_depth", claimed, tuple(actual)
    elif claimed is not None:
        yield "transformer_depth", claimed, unet.middle_depth


def stage_claims(options: Config, spec: AutoencoderSpec, file: Path) -> Iterator[tuple[str, Any, Any]]:
    facts = {"embed_dim": spec.latent_channels} | ({"n_embed": spec.codes} if spec.codes else {})
    yield from given(facts, options)
    inner = params(options, file, "ddconfig")
    facts = {
        "z_channels": spec.z_channels,
        "num_res_blocks": spec.res_blocks,
        "in_channels": spec.image_channels,
        "ch": spec.channels[0] // first(inner.get("ch_mult")),
        "double_z": not spec.codes,
    }
    yield from given(facts, inner)
    yield from levels("ch_mult", inner.get("ch_mult"), spec.channels)


def condition_facts(condition: Condition | None) -> Config:
    if isinstance(condition, TokenSpec):
        return {
            "n_embed": condition.width,
            "n_layer": condition.layers,
            "max_seq_len": condition.tokens,
            "vocab_size": condition.vocabulary,
        }
    if isinstance(condition, ClassSpec):
        return {"n_classes": condition.classes, "embed_dim": condition.width}
    return {"in_channels": condition.classes, "out_channels": condition.channels} if condition else {}


def first(mult: Any) -> int:
    """By how much the finest level is wider than the base."""
    return mult[0] if isinstance(mult, list) and mult and type(mult[0]) is int and mult[0] > 0 else 1


def levels(option: str, mult: Any, channels: tuple[int, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Multiples, against the widths that levels have."""
    if isinstance(mult, list):
        base = channels[0] // first(mult)
        yield option, mult, tuple(width // base if base else 0 for width in channels)

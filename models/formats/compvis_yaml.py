"""YAML configuration files of the CompVis code: facts that the tensors of a single file do not show.

Only numbers and the names of known options are read; the classes that a file names are never imported. Values
that the tensors show too must agree with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from models.errors import CheckpointError
from models.formats.config_files import Config, read_yaml, shortened
from models.formats.hints import Hints
from models.spec import (
    AutoencoderSpec,
    BetaSchedule,
    ClassSpec,
    Condition,
    ModelSpec,
    Prediction,
    ScheduleSpec,
    TokenSpec,
    UNetSpec,
)

SUFFIXES = (".yaml", ".yml")
WEIGHT_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth")
# CompVis's names -> ours
SCHEDULES: dict[str, BetaSchedule] = {"linear": "scaled_linear", "sqrt_linear": "linear"}
PREDICTIONS: dict[str, Prediction] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCALINGS = {"EpsScaling": "eps", "VScaling": "v"}  # names in SDXL's configurations -> CompVis's
DEFAULT_START, DEFAULT_END = 0.0001, 0.02  # betas, if a configuration has only one of them
MAX_VALUE = 2**16  # of any size or count
MAX_LEVELS = 16

Claim = tuple[str, Any, Any]  # option, its value in the file, its value by the weights
Known = TypeVar("Known")


@dataclass(frozen=True)
class CompvisConfig:
    """A configuration and the file that it was read from."""

    file: Path
    values: Config

    @property
    def model(self) -> Config:
        """Parameters of the model. Raises CheckpointError if the file has another structure."""
        model = self.values.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("params"), dict):
            raise CheckpointError(f"{self.file} has no model.params, as CompVis's configurations have")
        params: Config = model["params"]
        return params

    def hints(self) -> Hints:
        """The facts that no tensor shows. Raises CheckpointError, naming the invalid option."""
        model, file = self.model, self.file
        unet = unet_params(model, file)
        stage = section(model, file, "first_stage_config", "params", "ddconfig")
        width, multiples = unet.get("num_head_channels", -1), stage.get("ch_mult")
        scale = None if model.get("scale_by_std") else model.get("scale_factor")
        size = model.get("image_size", unet.get("image_size"))
        levels = len(multiples) if isinstance(multiples, list) else 0
        factor = 1 << (levels - 1) if 0 < levels < MAX_LEVELS else None
        first_stage_alone = "ddconfig" in model
        if first_stage_alone:
            size, factor = section(model, file, "ddconfig").get("resolution"), 1
        by_heads, heads = width in (-1, None), unet.get("num_heads", -1)
        return Hints(
            origin=file,
            image_size=None
            if size is None or factor is None
            else whole_number(size, "image_size", file) * factor,
            heads=whole_number(heads, "num_heads", file) if by_heads and heads not in (-1, None) else None,
            head_width=None if by_heads else whole_number(width, "num_head_channels", file),
            scale_factor=None if scale is None else positive_number(scale, "scale_factor", file),
            schedule=None if first_stage_alone else schedule(model, file),
            prediction=None if first_stage_alone else prediction(model, file),
        )

    def check(self, spec: ModelSpec) -> None:
        """Raise CheckpointError, naming the option, if the configuration contradicts the weights."""
        for option, claimed, actual in self.claims(spec):
            claimed = tuple(claimed) if isinstance(claimed, list) else claimed
            if claimed != actual:
                raise CheckpointError(
                    f"{self.file}: {option} is {shortened(claimed)}, but the weights have {actual!r}"
                )

    def claims(self, spec: ModelSpec) -> Iterator[Claim]:
        """Every option whose value follows from the weights too."""
        model, file = self.model, self.file
        if not spec.unet:
            yield from first_stage_claims(model, spec.autoencoder, file)
            return
        stage = section(model, file, "first_stage_config", "params")
        condition = section(model, file, "cond_stage_config", "params") if spec.condition else {}
        yield from present({"channels": spec.autoencoder.latent_channels}, model)
        yield from unet_claims(unet_params(model, file), spec.unet)
        yield from first_stage_claims(stage, spec.autoencoder, file)
        yield from present(condition_values(spec.condition), condition)


def find_config(weights: Path) -> CompvisConfig | None:
    """The configuration of a file of weights: the YAML file of the same stem, or the folder's only one.

    The folder's only YAML file does not count if it has the stem of another file of weights or no `model`.
    """
    found = sorted(
        path for path in weights.parent.glob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    for path in found:
        if path.stem == weights.stem:
            return CompvisConfig(path, read_yaml(path))
    others = {path.stem for path in weights.parent.glob("*") if path.suffix.lower() in WEIGHT_SUFFIXES}
    if len(found) != 1 or found[0].stem in others - {weights.stem}:
        return None
    config = CompvisConfig(found[0], read_yaml(found[0]))
    return config if isinstance(config.values.get("model"), dict) else None


def section(config: Config, file: Path, *path: str) -> Config:
    """The mapping below a path of names; empty if there is none. Raises CheckpointError for another value."""
    value: Any = config
    for key in path:
        value = value.get(key, {})
        if not isinstance(value, dict):
            raise CheckpointError(f"{file}: {key} must be an object, not {shortened(value)}")
    return dict(value)


def unet_params(model: Config, file: Path) -> Config:
    """Parameters of the UNet, which SDXL's files call the network."""
    return section(model, file, "unet_config" if "unet_config" in model else "network_config", "params")


def prediction(model: Config, file: Path) -> Prediction | None:
    """What the UNet predicts: epsilon in CompVis's code if a complete configuration does not say.

    None if the configuration describes no UNet and does not say.
    """
    scaling = section(model, file, "denoiser_config", "params", "scaling_config").get("target", "EpsScaling")
    default = one_of("scaling_config", str(scaling).rpartition(".")[2], SCALINGS, file)
    complete = {"linear_start", "unet_config", "network_config"} & model.keys()
    if "parameterization" not in model and not complete:
        return None
    return one_of("parameterization", model.get("parameterization", default), PREDICTIONS, file)


def schedule(model: Config, file: Path) -> ScheduleSpec | None:
    """The noise schedule; None if the configuration does not mention it."""
    if not {"linear_start", "linear_end"} & model.keys():
        return None
    beta_schedule = one_of("beta_schedule", model.get("beta_schedule", "linear"), SCHEDULES, file)
    start, end = (
        positive_number(model.get(option, default), option, file)
        for option, default in (("linear_start", DEFAULT_START), ("linear_end", DEFAULT_END))
    )
    if end >= 1 or start > end:
        raise CheckpointError(f"{file}: linear_start and linear_end are {start} and {end}")
    timesteps = whole_number(model.get("timesteps", 1000), "timesteps", file)
    return ScheduleSpec(start, end, beta_schedule, timesteps)


def one_of(option: str, value: Any, accepted: Mapping[str, Known], file: Path) -> Known:
    """Our name for an option's value. Raises CheckpointError for a value that is not accepted."""
    if not isinstance(value, str) or value not in accepted:
        raise CheckpointError(f"{file}: {option} is {shortened(value)}; supported are {', '.join(accepted)}")
    return accepted[value]


def whole_number(value: Any, option: str, file: Path) -> int:
    if type(value) is not int or not 1 <= value <= MAX_VALUE:
        raise CheckpointError(
            f"{file}: {option} must be a whole number from 1 to {MAX_VALUE}, not {shortened(value)}"
        )
    return value


def positive_number(value: Any, option: str, file: Path) -> float:
    """A number above 0, which may be a string: YAML reads 1e-4 as one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise CheckpointError(f"{file}: {option} must be a number above 0, not {shortened(value)}")
    return number


def present(values: Config, options: Config) -> Iterator[Claim]:
    """The claims for those of these values that a configuration contains."""
    return ((name, options[name], value) for name, value in values.items() if options.get(name) is not None)


def unet_claims(options: Config, unet: UNetSpec) -> Iterator[Claim]:
    values = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.channels[0] // first_multiple(options.get("channel_mult")),
        "num_res_blocks": unet.res_blocks,
        "use_scale_shift_norm": unet.scale_shift_norm,
        "resblock_updown": unet.residual_resampling,
        "use_spatial_transformer": unet.context_width > 0,
    }
    if unet.added_width:
        values["adm_in_channels"] = unet.added_width
    if unet.noise_levels:
        values["num_classes"] = unet.noise_levels
    if unet.context_width:
        values |= {"context_dim": unet.context_width, "use_linear_in_transformer": unet.linear_projection}
        yield from depth_claims(options.get("transformer_depth"), unet)
    yield from present(values, options)
    yield from width_claims("channel_mult", options.get("channel_mult"), unet.channels)
    factors = options.get("attention_resolutions")
    if isinstance(factors, list):
        attends = [2**level for level, depth in enumerate(unet.transformer_depth) if depth]
        claimed = sorted({f for f in factors if type(f) is int and f <= unet.factor})
        yield "attention_resolutions", claimed, tuple(attends)


def depth_claims(claimed: Any, unet: UNetSpec) -> Iterator[Claim]:
    """Depths for all levels or for each. The depth of a level without attention does not matter."""
    if isinstance(claimed, list) and len(claimed) == len(unet.transformer_depth):
        actual = [depth or value for depth, value in zip(unet.transformer_depth, claimed, strict=True)]
        yield "transformer_depth", claimed, tuple(actual)
    elif claimed is not None:
        yield "transformer_depth", claimed, unet.middle_depth


def first_stage_claims(options: Config, spec: AutoencoderSpec, file: Path) -> Iterator[Claim]:
    codebook = {"n_embed": spec.codes} if spec.codes else {}
    yield from present({"embed_dim": spec.latent_channels} | codebook, options)
    inner = section(options, file, "ddconfig")
    values = {
        "z_channels": spec.z_channels,
        "num_res_blocks": spec.res_blocks,
        "in_channels": spec.image_channels,
        "ch": spec.channels[0] // first_multiple(inner.get("ch_mult")),
        "double_z": not spec.codes,
    }
    yield from present(values, inner)
    yield from width_claims("ch_mult", inner.get("ch_mult"), spec.channels)


def condition_values(condition: Condition | None) -> Config:
    """The options of a conditioner that its weights show."""
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


def first_multiple(multiples: Any) -> int:
    """The finest level's multiple of the base width."""
    valid = isinstance(multiples, list) and multiples and type(multiples[0]) is int and multiples[0] > 0
    return multiples[0] if valid else 1


def width_claims(option: str, multiples: Any, channels: tuple[int, ...]) -> Iterator[Claim]:
    """Multiples of the base width, compared with the widths of the levels."""
    if isinstance(multiples, list):
        base = channels[0] // first_multiple(multiples)
        yield option, multiples, tuple(width // base if base else 0 for width in channels)

"""Models of Stable Diffusion XL's shape that were trained on noise levels (Karras et al. 2022): EDM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from models.errors import CheckpointError
from models.formats.config_files import Config
from models.formats.safetensors import Header
from models.formats.schedule_tensors import read_table
from models.spec import ModelSpec, Prediction, ScheduleSpec

# Tensors that mark such a model in a single file: of Playground v2.5, and of CosXL.
MEAN, STD = "edm_mean", "edm_std"
SIGMA_MIN, SIGMA_MAX = "edm_vpred.sigma_min", "edm_vpred.sigma_max"
PLAYGROUND_RANGE, PLAYGROUND_DATA = (0.002, 80.0), 0.5
COSXL_DATA = 1.0
# diffusers: the prediction type of EDM's schedulers -> ours.
PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "edm", "v_prediction": "v_prediction"}
SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FIXED = {"rho": (7.0,), "sigma_schedule": ("karras",), "solver_order": (2,)}


def is_edm(config: Config) -> bool:
    """Whether a scheduler's configuration is of noise levels."""
    return config.get("_class_name") in SCHEDULERS


def schedule_of_config(config: Config) -> ScheduleSpec:
    """Raises ValueError for a value that is not supported."""
    for option, accepted in FIXED.items():
        if config.get(option, accepted[0]) not in accepted:
            raise ValueError(f"{option} is {config[option]}, which is not supported; expected {accepted[0]}")
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type is {kind}; supported are {', '.join(PREDICTIONS)}")
    usual = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    low, high, data = (float(config.get(key, value)) for key, value in usual.items())
    return schedule(low, high, data, PREDICTIONS[kind])


def schedule(low: float, high: float, data: float, prediction: Prediction) -> ScheduleSpec:
    """Raises ValueError for noise levels that do not rise from above 0."""
    if not 0 < low < high < 1e6 or not 0 < data < 1e6:
        raise ValueError(f"sigma_min, sigma_max and sigma_data are {low}, {high} and {data}")
    return ScheduleSpec(
        prediction=prediction,
        spacing="linspace",
        steps_offset=0,
        final_alpha_one=True,
        sigma_range=(low, high),
        sigma_data=data,
    )


def config_of_schedule(spec: ScheduleSpec) -> Config:
    """The configuration of diffusers."""
    kinds = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    return {
        "_class_name": SCHEDULERS[1],
        "sigma_min": spec.sigma_range[0],
        "sigma_max": spec.sigma_range[1],
        "sigma_data": spec.sigma_data,
        "sigma_schedule": "karras",
        "num_train_timesteps": spec.timesteps,
        "prediction_type": kinds[spec.prediction],
    }


def with_tensors(spec: ModelSpec, file: Path, header: Header) -> ModelSpec:
    """The spec of a model in a single file, with the noise levels that its tensors give, if any."""
    mean, std = numbers(file, header, MEAN), numbers(file, header, STD)
    low, high = numbers(file, header, SIGMA_MIN), numbers(file, header, SIGMA_MAX)
    channels = spec.autoencoder.latent_channels
    try:
        if mean and std:
            if len(mean) != channels or len(std) != channels or min(std) <= 0:
                raise ValueError(f"{MEAN} and {STD} must have {channels} numbers, those of {STD} above 0")
            autoencoder = replace(spec.autoencoder, latents_mean=mean, latents_std=std)
            spec = replace(spec, autoencoder=autoencoder)
            return with_levels(spec, schedule(*PLAYGROUND_RANGE, PLAYGROUND_DATA, spec.schedule.prediction))
        if high:
            least = low[0] if low else PLAYGROUND_RANGE[0]
            return with_levels(spec, schedule(least, high[0], COSXL_DATA, spec.schedule.prediction))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    return spec


def with_levels(spec: ModelSpec, levels: ScheduleSpec) -> ModelSpec:
    """The spec with a schedule of noise levels, and the defaults that such models are run with."""
    guidance = 3.0 if levels.prediction == "edm" else spec.defaults.guidance_scale
    defaults = replace(spec.defaults, sampler="dpmpp_2m", spacing="karras", guidance_scale=guidance)
    return replace(spec, schedule=levels, defaults=defaults)


def numbers(file: Path, header: Header, key: str) -> tuple[float, ...]:
    """The numbers of a small tensor, to the digits of float32; () if it is missing."""
    table = read_table(file, header, key)
    return () if table is None else tuple(float(f"{value:.7g}") for value in table.values.flatten())

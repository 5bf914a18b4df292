"""Unsupported parts of a request: refused if they would change the image, otherwise ignored.

A1111 ignores unknown fields, unknown styles and more. So does this service, with a warning in the response's
`info.warnings`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from models.spec import ModelSpec
from service.api.a1111.options import (
    CLIP_SKIP,
    DECODER,
    NEUTRAL_IMG2IMG,
    NEUTRAL_SAMPLER,
    check_options,
    reads_clip_skip,
)
from service.api.a1111.samplers import SamplerChoice
from service.api.a1111.schemas import ImageToImage, Processing
from service.errors import InvalidRequest
from service.requests.checks import require

MAX_NAMES = 20  # ignored names that a warning lists
MAX_NAME_CHARS = 64
SETTINGS = "override_settings"

# Field -> its values that do not change the image, besides null. All other values are refused.
NEUTRAL_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "infotext": ("",),
    "initial_noise_multiplier": (1.0,),
    "latent_mask": ("",),
    "restore_faces": (False,),
    "s_min_uncond": (0.0,),
    "script_name": ("", "None"),
    "token_merging_ratio": (0.0,),
}


CONTROLNET = "controlnet"  # the script that is supported, in any case of letters
UNIT_MODELS = ("model", "module", "ad_model")  # fields of ControlNet's and ADetailer's units
NO_MODEL = (None, "", "None", "none")


def check_unsupported(body: Processing, choice: SamplerChoice, spec: ModelSpec) -> list[str]:
    """Warnings about ignored parts. Raises InvalidRequest for parts that would change the image."""
    check_fields(body)
    scripts = {
        name: script for name, script in (body.alwayson_scripts or {}).items() if name.lower() != CONTROLNET
    }
    check_scripts(scripts)
    ignored = [*(body.model_extra or {})]
    if body.save_images:
        ignored.append("save_images")
    ignored += check_settings(body, choice, spec)
    warnings = [*choice.warnings, *ignored_warning("These fields have no effect here", ignored)]
    warnings += ignored_warning("These styles do not exist", body.styles or ())
    return warnings + ignored_warning("These scripts do not exist", scripts)


def check_fields(body: Processing) -> None:
    for name, neutral in NEUTRAL_FIELDS.items():
        value = getattr(body, name, None)
        expected = " or ".join(map(json.dumps, neutral))
        require([(name, value is None or value in neutral, f"is not supported; it must be {expected}")])
    resized = (body.seed_resize_from_w or 0) > 0 and (body.seed_resize_from_h or 0) > 0
    rules = [
        ("seed_resize_from_w", not resized, "is not supported; it must be -1 or 0"),
    ]
    if isinstance(body, ImageToImage):
        rules.append(("resize_mode", body.resize_mode != 3, "must be 0, 1 or 2"))
    require(rules)


def check_settings(body: Processing, choice: SamplerChoice, spec: ModelSpec) -> list[str]:
    """Names of options in override_settings that are ignored. Raises InvalidRequest."""
    options = dict(body.override_settings or {})
    ignored = []
    if options.pop(CLIP_SKIP, 1) not in (None, 1, "1") and not reads_clip_skip(spec):
        ignored.append(f"{SETTINGS}.{CLIP_SKIP}")
    options.pop(DECODER, None)  # read by decoder_of()
    tables = [NEUTRAL_SAMPLER.get(choice.name, {})]
    if isinstance(body, ImageToImage):
        tables.append(NEUTRAL_IMG2IMG)
    return ignored + check_options(options, *tables, within=SETTINGS)


def check_scripts(scripts: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for an extension's script that is switched on."""
    for name, script in scripts.items():
        arguments = script.get("args") if isinstance(script, dict) else script
        if not switched_off(arguments):
            shown = shown_name(name)
            raise InvalidRequest(
                f"alwayson_scripts.{shown} is not supported; it must have no arguments or be switched off",
                param=f"alwayson_scripts.{shown}",
            )


def switched_off(arguments: Any) -> bool:
    """Whether a script has no arguments, the first is false, or all are disabled units."""
    if not arguments or not isinstance(arguments, list):
        return not arguments
    if arguments[0] is False:
        return True
    return all(unit is None or (isinstance(unit, dict) and unit_is_off(unit)) for unit in arguments)


def unit_is_off(unit: dict[str, Any]) -> bool:
    """Whether a unit of a script is disabled, or has no model to work with."""
    models = [unit[name] for name in UNIT_MODELS if name in unit]
    return unit.get("enabled") is False or (bool(models) and all(model in NO_MODEL for model in models))


def ignored_warning(reason: str, names: Iterable[str]) -> list[str]:
    """A warning that lists the ignored names of a client; empty if there are none."""
    shown = [shown_name(name) for name in names]
    if not shown:
        return []
    more = ", ..." if len(shown) > MAX_NAMES else ""
    return [f"{reason} and are ignored: {', '.join(shown[:MAX_NAMES])}{more}"]


def shown_name(name: str) -> str:
    """A name from a client, shortened, as valid UTF-8 text."""
    return name.encode("utf-8", "replace").decode()[:MAX_NAME_CHARS]

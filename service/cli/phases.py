"""The arguments of `ldm generate` and `inpaint` that divide a run into phases."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from models.upscalers import UPSCALERS
from service.cli.options import UsageError
from service.model_paths import locate
from service.settings import Settings

HIRES = ("scale", "strength", "steps", "upscaler", "prompt", "negative_prompt")  # --hires-NAME


def add_hires(command: argparse.ArgumentParser) -> None:
    """The arguments of a second pass at a larger size."""
    add = command.add_argument
    add("--hires-scale", type=float, metavar="X", help="a second pass at X times the size")
    add(
        "--hires-strength",
        type=float,
        metavar="X",
        help="how much it changes the image, 0 to 1 (default: 0.5)",
    )
    add(
        "--hires-steps",
        type=int,
        metavar="N",
        help="steps of its schedule, before --hires-strength (default: as the first pass)",
    )
    add(
        "--hires-upscaler",
        metavar="NAME",
        help=f"how the first image is enlarged: {', '.join(UPSCALERS)}, or a model (default: latent)",
    )
    add("--hires-prompt", metavar="PROMPT", help="prompt of the second pass (default: that of the first)")
    add(
        "--hires-negative-prompt",
        metavar="PROMPT",
        help="negative prompt of the second pass (default: that of the first)",
    )


def hires_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """The field `hires`. Raises UsageError for other arguments without --hires-scale, and ModelPathError."""
    values = {name: getattr(args, f"hires_{name}", None) for name in HIRES}
    given = {name: value for name, value in values.items() if value is not None}
    if given and "scale" not in given:
        flag = f"--hires-{next(iter(given))}".replace("_", "-")
        raise UsageError(f"{flag} has no effect without --hires-scale")
    if model := upscaling_model(args):
        given["upscaler"], _ = locate(model, bool(args.allow_pickle))
    return given or None


def add_phases(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--refiner", metavar="MODEL", help="another model, by name or path, that makes the last steps")
    add(
        "--refiner-switch-at",
        type=float,
        metavar="X",
        help="fraction of the steps after which it begins (default: 0.8)",
    )


def with_models(settings: Settings, args: argparse.Namespace) -> Settings:
    """The settings, with the refiner and an upscaling model of the second pass among the models."""
    named = getattr(args, "refiner", None), upscaling_model(args)
    added = (name for name in named if name is not None and name not in settings.model)
    return replace(settings, model=(*settings.model, *added))


def upscaling_model(args: argparse.Namespace) -> str | None:
    """The upscaling model of the second pass, by name or path."""
    upscaler: str | None = getattr(args, "hires_upscaler", None)
    return None if upscaler in UPSCALERS else upscaler


def refiner_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """The field `refiner`. Raises UsageError for a switch without a refiner, and ModelPathError."""
    refiner, switch_at = getattr(args, "refiner", None), getattr(args, "refiner_switch_at", None)
    if refiner is None and switch_at is not None:
        raise UsageError("--refiner-switch-at has no effect without --refiner")
    if refiner is None:
        return None
    name, _ = locate(refiner, bool(args.allow_pickle))
    return {"model": name} | ({} if switch_at is None else {"switch_at": switch_at})

"""The request that the arguments of `ldm generate`, `inpaint` and `upscale` describe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.spec import ModelSpec
from service.cli.from_image import fields_of_file
from service.cli.options import UsageError
from service.cli.phases import hires_of, refiner_of
from service.requests.resolve import build_request
from service.requests.schemas import AnyRequest
from service.settings import Settings

# Fields of a request that are arguments of the same name.
REQUEST_FIELDS = (
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "steps",
    "guidance_scale",
    "seed",
    "n",
    "sampler",
    "eta",
    "spacing",
    "long_prompts",
    "prompt_weights",
    "strength",
    "guidance_start",
    "guidance_end",
    "guidance_rescale",
    "image_guidance_scale",
    "prompt_syntax",
    "decoder",
    "tiling",
    "clip_skip",
    "class_label",
    "boxes",
    "scale",
    "noise_level",
    "mask_blur",
    "area",
    "padding",
    "fill",
    "extend",
)


def request_of(
    args: argparse.Namespace, kind: type[AnyRequest], files: Mapping[str, str], repeated: Mapping[str, Any]
) -> AnyRequest:
    """The request that the arguments describe. Raises InvalidRequest, or UsageError for a file.

    repeated: fields of an image that is made again; arguments take precedence.
    """
    fields: dict[str, Any] = {name: getattr(args, name, None) for name in REQUEST_FIELDS}
    fields["variation"] = variation_of(args)
    interval = getattr(args, "feature_cache", None)
    fields["feature_cache"] = None if interval is None else {"interval": interval}
    fields |= {"refiner": refiner_of(args), "hires": hires_of(args)}
    fields = dict(repeated) | {name: value for name, value in fields.items() if value is not None}
    if not repeated.get("loras"):  # else the image's own weights
        fields["loras"] = {entry.partition("=")[0]: weight for entry, weight in args.lora}
    fields |= guides_of(args)
    return build_request(kind, fields | {name: read(Path(file)) for name, file in files.items()})


def fields_from(
    args: argparse.Namespace, specs: Mapping[str, ModelSpec], settings: Settings
) -> dict[str, Any]:
    """The fields of the image given by --from. Raises UsageError and InvalidRequest."""
    fields = fields_of_file(read(Path(args.repeat)), specs, settings)
    if args.model:  # the model of this path, whatever it was called when the image was made
        fields.pop("model", None)
    return fields


def variation_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """The field `variation`; None if no strength is given. Raises UsageError for a seed without strength."""
    strength, seed = getattr(args, "variation_strength", None), getattr(args, "variation_seed", None)
    if strength is None and seed is not None:
        raise UsageError("--variation-seed has no effect without --variation-strength")
    return None if strength is None else {"strength": strength, "seed": -1 if seed is None else seed}


def guides_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields `controls` and `reference_images`, if there are any. Raises UsageError for a file."""
    fields: dict[str, Any] = {}
    if controls := getattr(args, "controls", []):
        how = {"preprocess": args.preprocess} if args.preprocess else {}
        fields["controls"] = [
            {"model": name, "image": read(Path(file)), "scale": scale, **how}
            for name, file, scale in controls
        ]
    if references := getattr(args, "references", []):
        fields["reference_images"] = [
            {"adapter": name, "image": read(Path(file)), "scale": scale} for name, file, scale in references
        ]
    return fields


def read(file: Path) -> bytes:
    """The content of a file. Raises UsageError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None

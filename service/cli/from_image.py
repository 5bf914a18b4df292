"""The request that made an image, from the parameters in its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from models.spec import ModelSpec
from service.cli.options import UsageError
from service.requests import images
from service.requests.metadata import read_parameters
from service.settings import Settings


def fields_of_file(file: bytes, specs: Mapping[str, ModelSpec], settings: Settings) -> dict[str, Any]:
    """The fields of the native request for the image of a file of this service, or of A1111's web UI.

    Raises UsageError for a file without parameters, and InvalidRequest for one that is no image or whose
    parameters are not supported.
    """
    text, _ = read_parameters(images.decode(file, "--from", settings.max_input_pixels))
    if not text:
        raise UsageError("--from: the file has no parameters")
    return fields_of_json(text) if text.startswith("{") else fields_of_infotext(text, specs)


def fields_of_json(text: str) -> dict[str, Any]:
    """The fields of a file of this service."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise UsageError("--from: the parameters in the file are not readable")
    return fields


def fields_of_infotext(text: str, specs: Mapping[str, ModelSpec]) -> dict[str, Any]:
    """The fields of a file of A1111's web UI or API."""
    from service.api.a1111 import infotext, options  # FastAPI: slow to import
    from service.api.a1111.samplers import choose_sampler
    from service.api.a1111.schemas import Processing
    from service.api.a1111.translate import sampling_fields

    try:
        body = Processing(**infotext.fields_of(text))
    except (ValueError, ValidationError):
        raise UsageError("--from: the parameters in the file are not readable") from None
    if body.steps is None:
        raise UsageError("--from: the parameters in the file are not readable")
    if names := infotext.unsupported(text):
        raise UsageError(f"--from: the file was made with {', '.join(names)}, which is not supported here")
    model = (body.override_settings or {}).get(options.CHECKPOINT)
    spec = specs.get(model or "", next(iter(specs.values())))
    fields = sampling_fields(body, choose_sampler(body), spec, 1)
    strength = (body.model_extra or {}).get("denoising_strength")
    return fields | {"model": model, "strength": strength}

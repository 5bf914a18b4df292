"""From a wire body and the model's spec to a job, or to an error that names the field."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from models.samplers import SAMPLERS
from models.spec import ModelSpec
from service.errors import InvalidRequest, NotFound, UnreadableBody, UnsupportedMedia
from service.job import MAX_SEED, Job
from service.registry import first_of
from service.schemas import GenerateRequest
from service.settings import Settings

SHOWN = 64  # characters of a client's own words that an error repeats

WORDING = {
    "missing": "is required",
    "extra_forbidden": "is not a field of this request",
    "string_unicode": "must be text that UTF-8 can hold",
    "int_parsing_size": "is too large",
}


PHRASES = {"Value error, ": "", "Input should be ": "must be ", "String should have ": "must have "}


def to_job(body: GenerateRequest, specs: Mapping[str, ModelSpec], settings: Settings) -> Job:
    """The job a body asks for. Raises NotFound for the model, InvalidRequest for the rest."""
    spec = find_model(body.model, specs)
    defaults = spec.defaults
    job = Job(
        id=uuid.uuid4().hex,
        model=spec.name,
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        width=given(body.width, defaults.width),
        height=given(body.height, defaults.height),
        steps=given(body.steps, defaults.steps),
        guidance_scale=given(body.guidance_scale, defaults.guidance_scale),
        seed=given(body.seed, secrets.randbelow(MAX_SEED - body.n)),
        n=body.n,
        sampler=given(body.sampler, defaults.sampler),
        eta=given(body.eta, defaults.eta),
        priority=body.priority,
    )
    check(job, spec, settings)
    return job


def given(value: Any, default: Any) -> Any:
    """The value, unless it is None: 0 is a value."""
    return default if value is None else value


def find_model(name: str | None, specs: Mapping[str, ModelSpec]) -> ModelSpec:
    """Looked up, and nothing else: a name never becomes a path."""
    name = given(name, first_of(specs))
    if name not in specs:
        raise NotFound(f"model: there is no such model; expected one of {', '.join(specs)}", param="model")
    return specs[name]


def check(job: Job, spec: ModelSpec, settings: Settings) -> None:
    """Raise InvalidRequest for the first thing that this model or this service cannot do."""
    multiple, timesteps = spec.size_multiple, spec.schedule.timesteps
    pixels = job.width * job.height
    most = settings.max_work
    rules = (
        ("width", job.width % multiple == 0, f"must be a multiple of {multiple}"),
        ("height", job.height % multiple == 0, f"must be a multiple of {multiple}"),
        ("width", pixels <= settings.max_pixels, f"times height must be at most {settings.max_pixels}"),
        ("steps", job.steps <= timesteps, f"must be at most {timesteps}"),
        ("n", job.n <= settings.max_images, f"must be at most {settings.max_images}"),
        ("n", job.n * job.steps * pixels <= most, f"times steps, width and height must be at most {most}"),
        ("sampler", job.sampler in SAMPLERS, f"must be one of {', '.join(SAMPLERS)}"),
        ("seed", job.seed + job.n - 1 <= MAX_SEED, f"plus n must be at most {MAX_SEED + 1}"),
    )
    for param, holds, expected in rules:
        if not holds:
            raise InvalidRequest(f"{param} {expected}", param=param)


def explain(errors: Sequence[Mapping[str, Any]], content_type: str = "application/json") -> InvalidRequest:
    """The first of pydantic's errors as ours; never repeats values, which may be anything."""
    error = errors[0]
    path = [part for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        return UnreadableBody()
    if not path:
        return UnreadableBody() if "json" in content_type or not content_type else UnsupportedMedia()
    param = ".".join(map(str, path)).encode("utf-8", "replace").decode()[:SHOWN]
    return InvalidRequest(f"{param} {wording(error)}", param=param)


def wording(error: Mapping[str, Any]) -> str:
    """What was expected, to follow the field's name."""
    text = WORDING.get(error["type"], error["msg"])
    for theirs, ours in PHRASES.items():
        text = text.replace(theirs, ours)
    return text

"""The mix of requests: kinds of requests with weights, and requests drawn from them."""

from __future__ import annotations

import base64
import io
import json
import random
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.requests.control_schemas import MAX_CONTROLS, MAX_REFERENCES
from service.requests.validation_errors import explain

PROMPTS = (
    "a red apple",
    "a smiling yellow face",
    "a small green tree",
    "a blue car",
    "a cat",
    "the sun, rising",
)
PATHS = {"text-to-image": "/generate", "image-to-image": "/generate", "inpainting": "/inpaint"}
Factor = Annotated[float, Field(gt=0, le=16)]


class Entry(BaseModel):
    """A kind of request. `width`, `height`: factors of the model's default size. None: not sent.

    controls, reference_images: how many, of the model's own in turn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Annotated[float, Field(gt=0)] = 1.0
    task: Literal["text-to-image", "image-to-image", "inpainting"] = "text-to-image"
    steps: int | None = None
    guidance_scale: float | None = None
    n: int = 1
    width: Factor = 1.0
    height: Factor = 1.0
    strength: float | None = None
    controls: Annotated[int, Field(ge=0, le=MAX_CONTROLS)] = 0
    reference_images: Annotated[int, Field(ge=0, le=MAX_REFERENCES)] = 0

    def problem(self, model: Mapping[str, Any]) -> str | None:
        """Why a model cannot run such requests, as a clause; None if it can. model: as for draw()."""
        if self.task not in model["tasks"]:
            return f"has {self.task}; the model supports {', '.join(model['tasks'])}"
        if self.controls and not usable_controls(model):
            return "has controls, and the model has none: --controlnet NAME=PATH"
        if self.reference_images and not model["reference_adapters"]:
            return "has reference_images, and the model has no adapter: --reference-adapter NAME=PATH"
        return None


class Mix(BaseModel):
    """A mix file."""

    requests: Annotated[tuple[Entry, ...], Field(min_length=1)]


DEFAULT = (
    Entry(weight=4, steps=20),
    Entry(weight=2, steps=10),
    Entry(weight=2, steps=30),
    Entry(weight=2, steps=50),
    Entry(weight=1, steps=30, n=4),
    Entry(weight=1, steps=20, guidance_scale=1),
    Entry(weight=1, steps=50, guidance_scale=1, n=2),
    Entry(weight=2, task="image-to-image", steps=30, strength=0.6),
    Entry(weight=1, task="image-to-image", steps=50, strength=0.8, guidance_scale=1),
    Entry(weight=2, task="inpainting", steps=30),
    Entry(weight=1, task="inpainting", steps=20, n=2),
    # Left out for models without controls or reference adapters:
    Entry(weight=3, steps=20, controls=1),
    Entry(weight=2, steps=30, controls=2),
    Entry(weight=2, steps=20, reference_images=1),
)


@dataclass(frozen=True)
class Request:
    """A request to send. rows: its rows in a UNet call with all its images."""

    task: str
    body: Mapping[str, Any]
    rows: int

    @property
    def path(self) -> str:
        return PATHS[self.task]


def read_mix(file: Path) -> tuple[Entry, ...]:
    """The entries of a .toml or .json file. Raises ValueError, or InvalidRequest that names the field."""
    try:
        text = file.read_text()
        content = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
        return Mix.model_validate(content).requests
    except ValidationError as error:
        raise explain(error.errors()) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--mix {file} cannot be read: {error}") from None


def draw(entries: Sequence[Entry], model: Mapping[str, Any], seed: int) -> Iterator[Request]:
    """Endless random requests for a model; `model`: its entry of GET /models."""
    chance = random.Random(seed)
    weights = [entry.weight for entry in entries]
    while True:
        entry = chance.choices(entries, weights)[0]
        yield to_request(entry, model, chance.choice(PROMPTS), chance.randrange(2**32))


def to_request(entry: Entry, model: Mapping[str, Any], prompt: str, seed: int) -> Request:
    """The request of an entry."""
    defaults, multiple = model["defaults"], model["limits"]["size_multiple"]
    width, height = (
        max(1, round(defaults[side] * getattr(entry, side) / multiple)) * multiple
        for side in ("width", "height")
    )
    body = {"model": model["name"], "prompt": prompt, "seed": seed, "n": entry.n}
    body |= {"width": width, "height": height} | image_fields(entry.task, width, height)
    body |= guide_fields(entry, model, width, height)
    chosen = {name: getattr(entry, name) for name in ("steps", "guidance_scale", "strength")}
    body |= {name: value for name, value in chosen.items() if value is not None}
    guidance = body.get("guidance_scale", defaults["guidance_scale"])
    return Request(entry.task, body, entry.n * (1 if guidance in (0, 1) else 2))


def image_fields(task: str, width: int, height: int) -> dict[str, str]:
    """The image fields of a request for the task."""
    if task == "image-to-image":
        return {"init_image": test_image(width, height, "RGB")}
    if task == "inpainting":
        return {"image": test_image(width, height, "RGB"), "mask": test_image(width, height, "L")}
    return {}


def usable_controls(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The model's controls that take any image."""
    return [control for control in model["control_details"] if not control["inpainting"]]


def guide_fields(entry: Entry, model: Mapping[str, Any], width: int, height: int) -> dict[str, Any]:
    """The fields `controls` and `reference_images`, if the entry has any."""
    fields: dict[str, Any] = {}
    if entry.controls:
        controls = islice(cycle(usable_controls(model)), entry.controls)
        image = test_image(width, height, "RGB")
        fields["controls"] = [
            {"model": each["name"], "image": image, "preprocess": "canny"}
            | ({"type": each["types"][0]} if each["types"] else {})
            for each in controls
        ]
    if entry.reference_images:
        adapters = islice(cycle(model["reference_adapters"]), entry.reference_images)
        image = test_image(width, height, "RGB")
        fields["reference_images"] = [{"adapter": name, "image": image} for name in adapters]
    return fields


@cache
def test_image(width: int, height: int, mode: str) -> str:
    """A PNG in base64: a disc on a background; in mode L a mask, white on black."""
    background, disc = ((0,), (255,)) if mode == "L" else ((200, 220, 240), (240, 190, 40))
    image = Image.new(mode, (width, height), background)
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=disc)
    file = io.BytesIO()
    image.save(file, "png")
    return base64.b64encode(file.getvalue()).decode()

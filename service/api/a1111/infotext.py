"""Writes and reads A1111's infotext: the prompts and parameters of an image as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_LINE = 10_000  # characters; a longer last line is not parsed
MIN_PAIRS = 3  # a last line with fewer pairs is not one of parameters
PAIR = re.compile(r'\s*(\w[\w /-]{1,80}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
SIZE = re.compile(r"(\d+)x(\d+)")
NEGATIVE = "Negative prompt:"


def write(prompt: str, negative_prompt: str, values: Mapping[str, Any]) -> str:
    """The prompts, then `name: value` pairs on one line; values that are None are left out."""
    last = ", ".join(f"{name}: {quoted(value)}" for name, value in values.items() if value is not None)
    negative = [f"{NEGATIVE} {negative_prompt}"] if negative_prompt else []
    return "\n".join([prompt, *negative, last])


def quoted(value: Any) -> str:
    """The value as text; quoted as in JSON if it contains a separator."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if {",", ":", "\n"} & {*text} else text


def parse(text: str) -> dict[str, str]:
    """The inverse of write(): name -> value, a size also as two sides. Empty for a text of another form."""
    *lines, last = text.strip().split("\n")
    pairs = PAIR.findall(last) if len(last) <= MAX_LINE else []
    if len(pairs) < MIN_PAIRS:
        return {}
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    name = "Prompt"
    for line in lines:
        if line.startswith(NEGATIVE):
            name, line = "Negative prompt", line.removeprefix(NEGATIVE)
        prompts[name].append(line.strip())
    found = {name: "\n".join(lines) for name, lines in prompts.items()}
    for key, value in pairs:
        value = unquoted(value.strip())
        if size := SIZE.fullmatch(value):
            found[f"{key}-1"], found[f"{key}-2"] = size.groups()
        else:
            found[key] = value
    return found


def unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


# Name in an infotext -> field of A1111's requests, and the type of its values.
FIELDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "Prompt": ("prompt", str),
    "Negative prompt": ("negative_prompt", str),
    "Steps": ("steps", int),
    "Sampler": ("sampler_name", str),
    "Schedule type": ("scheduler", str),
    "CFG scale": ("cfg_scale", float),
    "Image CFG scale": ("image_cfg_scale", float),
    "Seed": ("seed", int),
    "Size-1": ("width", int),
    "Size-2": ("height", int),
    "Variation seed": ("subseed", int),
    "Variation seed strength": ("subseed_strength", float),
    "Denoising strength": ("denoising_strength", float),
    "Eta": ("eta", float),
    "Tiling": ("tiling", lambda text: text == "True"),
    "Hires upscale": ("hr_scale", float),
    "Hires resize-1": ("hr_resize_x", int),
    "Hires resize-2": ("hr_resize_y", int),
    "Hires steps": ("hr_second_pass_steps", int),
    "Hires upscaler": ("hr_upscaler", str),
    "Hires prompt": ("hr_prompt", str),
    "Hires negative prompt": ("hr_negative_prompt", str),
    "Refiner": ("refiner_checkpoint", str),
    "Refiner switch at": ("refiner_switch_at", float),
}


# Names that do not change the image, or that this service replaces: a seed's noise is that of A1111's CPU.
NEUTRAL = (
    "Model",
    "Clip skip",
    "Version",
    "Model hash",
    "VAE",
    "VAE hash",
    "Lora hashes",
    "TI hashes",
    "User",
    "RNG",
)


def unsupported(text: str) -> list[str]:
    """The names in an infotext that change the image and that fields_of() leaves out."""
    return [name for name in parse(text) if name not in (*FIELDS, *NEUTRAL)]


def fields_of(text: str) -> dict[str, Any]:
    """The fields of A1111's request for the image of an infotext. Raises ValueError for a wrong number."""
    found = parse(text)
    fields = {name: read(found[key]) for key, (name, read) in FIELDS.items() if key in found}
    if "Hires upscaler" in found:
        fields["enable_hr"] = True
    settings = {
        "sd_model_checkpoint": found.get("Model"),
        "CLIP_stop_at_last_layers": found.get("Clip skip"),
    }
    return fields | {"override_settings": {key: value for key, value in settings.items() if value}}


def parameters_of(text: str) -> dict[str, str]:
    """The parameters in the text of a file: JSON, which this service writes, or an infotext."""
    if text.startswith("{"):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            texts = {name: value for name, value in values.items() if isinstance(value, str)}
            return {name: json.dumps(value) for name, value in values.items()} | texts
    return parse(text)

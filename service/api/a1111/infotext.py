"""Writes and reads A1111's infotext: the prompts and parameters of an image as text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

KEY = "parameters"  # name of the text chunk in a PNG file
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
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


def read(image: Image.Image) -> tuple[str, dict[str, str]]:
    """(infotext, other texts) of an opened file; the infotext is empty if the file has none."""
    items = {str(name): value for name, value in image.info.items() if isinstance(value, str)}
    comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    text = items.pop(KEY, None)
    return text or (decoded(comment) if isinstance(comment, bytes) else ""), items


def decoded(comment: bytes) -> str:
    """The text of an Exif UserComment."""
    kind, text = comment[:8], comment[8:]
    encoding = "utf-16-be" if kind == b"UNICODE\0" else "utf-8"
    return text.decode(encoding, "replace").strip("\0")


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

"""Pydantic's validation errors as InvalidRequest, in this API's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.errors import InvalidRequest, UnreadableBody, UnsupportedMedia
from service.requests.checks import shorten

TASKS = ("generate", "inpaint", "upscale")  # of POST /jobs
UNKNOWN_TASK = ("union_tag_invalid", "union_tag_not_found")
WORDING = {
    **dict.fromkeys(UNKNOWN_TASK, f"must be one of {', '.join(TASKS)}"),
    "missing": "is required",
    "extra_forbidden": "is not a field of this request",
    "string_unicode": "must be text that UTF-8 can hold",
    "int_parsing_size": "is too large",
    "none_required": "is not supported here",
}


PHRASES = {"Value error, ": "", "Input should be ": "must be ", "String should have ": "must have "}


def explain(errors: Sequence[Mapping[str, Any]], content_type: str = "application/json") -> InvalidRequest:
    """The first of pydantic's errors. Never repeats a value, which may be anything."""
    error = errors[0]
    path = path_of(error)
    if error["type"] == "json_invalid":
        return UnreadableBody()
    if not path:
        return UnreadableBody() if "json" in content_type or not content_type else UnsupportedMedia()
    param = shorten(".".join(map(str, path)))
    return InvalidRequest(f"{param} {wording(error)}", param=param)


def path_of(error: Mapping[str, Any]) -> list[str | int]:
    """The field names that lead to an error, without the parts of the path that no request contains."""
    path: list[str | int] = list(error["loc"])
    if path[:1] in (["body"], ["header"]):
        del path[0]
    if error["type"] in UNKNOWN_TASK:
        return ["task"]
    if len(path) > 1 and path[0] in TASKS:  # the job type that the body was read as
        del path[0]
    return path


def wording(error: Mapping[str, Any]) -> str:
    """What was expected, to follow the field's name."""
    text: str = WORDING.get(error["type"], error["msg"])
    for theirs, ours in PHRASES.items():
        text = text.replace(theirs, ours)
    return text

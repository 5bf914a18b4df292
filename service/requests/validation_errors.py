"""Translates pydantic's validation errors to InvalidRequest, with messages of this service.

The messages quote no values, which may be anything, and no texts of the library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from service.errors import InvalidRequest, UnreadableBody, UnsupportedMedia
from service.requests.checks import shorten

Error = Mapping[str, Any]

TASKS = ("generate", "inpaint", "upscale")  # of POST /jobs
UNKNOWN_TASK = ("union_tag_invalid", "union_tag_not_found")
LOCATIONS = ("body", "header", "query", "path", "cookie", "file")  # first part of an error's path

DEFAULT_SENTENCE = "is invalid"
OBJECT, LIST, STRING, NUMBER = "must be an object", "must be a list", "must be a string", "must be a number"
INTEGER = "must be an integer"
# Error type -> text after the field's name. {x} is filled from the error's context.
SENTENCES = {
    **dict.fromkeys(UNKNOWN_TASK, f"must be one of {', '.join(TASKS)}"),
    **dict.fromkeys(
        ("missing", "missing_argument", "missing_keyword_only_argument", "missing_positional_only_argument"),
        "is required",
    ),
    **dict.fromkeys(
        (
            "extra_forbidden",
            "unexpected_keyword_argument",
            "unexpected_positional_argument",
            "no_such_attribute",
        ),
        "is not a field of this request",
    ),
    **dict.fromkeys(
        ("dict_type", "model_type", "model_attributes_type", "dataclass_type", "mapping_type"), OBJECT
    ),
    **dict.fromkeys(
        ("list_type", "tuple_type", "set_type", "frozen_set_type", "deque_type", "iterable_type"), LIST
    ),
    **dict.fromkeys(("string_type", "bytes_type", "invalid_key", "json_type"), STRING),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), INTEGER),
    **dict.fromkeys(("float_type", "float_parsing", "decimal_type", "decimal_parsing"), NUMBER),
    **dict.fromkeys(("recursion_loop", "recursion_depth_exceeded"), "is nested too deeply"),
    **dict.fromkeys(("literal_error", "enum"), "must be {expected}"),
    **dict.fromkeys(("string_too_short", "bytes_too_short"), "must have at least {min_length} characters"),
    **dict.fromkeys(
        ("string_too_long", "bytes_too_long", "url_too_long"), "must have at most {max_length} characters"
    ),
    **dict.fromkeys(("string_unicode", "bytes_invalid_encoding"), "must be text that UTF-8 can encode"),
    **dict.fromkeys(("url_type", "url_parsing", "url_syntax_violation"), "must be a URL"),
    **dict.fromkeys(("uuid_type", "uuid_parsing", "uuid_version"), "must be a UUID"),
    "int_parsing_size": "is too large",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "string_pattern_mismatch": "has the wrong format",
    "string_not_ascii": "must be ASCII text",
    "none_required": "is not supported here",
    "is_instance_of": "must be a file",
    "url_scheme": "must be a URL that starts with {expected_schemes}",
    "value_error": "{error}",  # raised by this project's validators
}
ONE = re.compile(r"\b1 (character|item)s\b")
# Pydantic's name of a member of a union, in the path of an error.
UNION_MEMBER = re.compile(r"(constrained-)?(int|float|str|bool|none|dict|bytes)|[\w-]+\[.*\]")


def explain(errors: Sequence[Error], content_type: str = "application/json") -> InvalidRequest:
    """The first of pydantic's errors as InvalidRequest. content_type: that of the request."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return UnreadableBody()
    path, sentence = path_of(error), sentence_of(error)
    if len(path) > 1 and UNION_MEMBER.fullmatch(str(path[-1])) and is_union(errors):
        sentences = dict.fromkeys(map(sentence_of, members(errors)))
        path, sentence = (
            path[:-1],
            " or ".join(sentences).replace(" or must ", " or ").replace(" or be ", " or "),
        )
    if not path:
        return UnreadableBody() if "json" in content_type else UnsupportedMedia()
    param = shorten(".".join(map(str, path)))
    return InvalidRequest(f"{param} {sentence}", param=param)


def members(errors: Sequence[Error]) -> list[Error]:
    """The errors about the same value as the first one: several if the field is a union."""
    return [error for error in errors[:16] if error["loc"][:-1] == errors[0]["loc"][:-1]]


def is_union(errors: Sequence[Error]) -> bool:
    return len(members(errors)) > 1


def path_of(error: Error) -> list[str | int]:
    """The field names that lead to the invalid value, without the parts that pydantic adds."""
    path: list[str | int] = list(error["loc"])
    if path and path[0] in LOCATIONS:
        del path[0]
    if error["type"] in UNKNOWN_TASK:
        return ["task"]
    if len(path) > 1 and path[0] in TASKS:  # the job type that the body was read as
        del path[0]
    return path


def sentence_of(error: Error) -> str:
    """The text after the field's name: what was expected."""
    context = error.get("ctx", {}).items()
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context}
    try:
        sentence = SENTENCES.get(error["type"], DEFAULT_SENTENCE).format(**shown)
    except (KeyError, IndexError):  # a context that this version of pydantic fills differently
        return DEFAULT_SENTENCE
    return ONE.sub(r"1 \1", sentence)

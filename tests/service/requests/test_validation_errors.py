"""pydantic's validation errors, translated to this API's messages."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticKnownError, core_schema

from service.errors import UnreadableBody, UnsupportedMedia
from service.requests.job_schemas import JobRequest
from service.requests.schemas import GenerateRequest
from service.requests.validation_errors import explain

LABEL = "must be a label of the model, by its name or its number"
BOX = {"name": "dog", "x": 0, "y": 0, "w": 1, "h": 1}
NUMBERS = (
    "actual_length decimal_places expected_version ge gt le lt max_digits max_length min_length multiple_of "
    "tz_actual tz_expected whole_digits"
)
TEXTS = (
    "attribute class class_name discriminator encoding encoding_error error expected expected_schemes "
    "expected_tags field_type method_name pattern tag"
)
CONTEXT: dict[str, Any] = dict.fromkeys(NUMBERS.split(), 2) | {name: f"<{name}>" for name in TEXTS.split()}
LIBRARY_WORDS = (
    "Input",
    "should",
    "valid ",
    "dictionary",
    "instance",
    "parse",
    "Extra",
    "python",
    "<pattern>",
)
OWN_PREFIXES = ("is ", "must ", "has ", "<error>")


@pytest.mark.parametrize("kind", get_args(core_schema.ErrorType))
def test_no_error_type_shows_the_librarys_wording(kind: str):
    message = PydanticKnownError(kind, CONTEXT).message()
    error = {"type": kind, "loc": ("field",), "msg": message, "ctx": CONTEXT, "input": "secret"}
    sentence = explain([error]).message.removeprefix("field ").removeprefix("task ")
    if kind == "json_invalid":
        return
    assert sentence.startswith(OWN_PREFIXES), sentence
    assert not any(word in sentence for word in LIBRARY_WORDS)


def test_an_unknown_error_type_has_a_sentence_too():
    error = {
        "type": "of_a_later_version",
        "loc": ("field",),
        "msg": "Input should be nice",
        "input": "secret",
    }
    assert explain([error]).message == "field is invalid"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"steps": "5"}, "steps must be an integer"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance_scale": 51}, "guidance_scale must be at most 50"),
        ({"prompt": ""}, "prompt must have at least 1 character"),
        ({"prompt": "  "}, "prompt must not be blank"),
        ({"prompt": "a" * 5000}, "prompt must have at most 4000 characters"),
        ({"prompt": "\ud800"}, "prompt must be text that UTF-8 can encode"),
        ({"prompt_weights": "yes"}, "prompt_weights must be true or false"),
        ({"output_format": "gif"}, "output_format must be 'png', 'jpeg' or 'webp'"),
        ({"class_label": 1.5}, f"class_label {LABEL}"),
        ({"boxes": [BOX] * 65}, "boxes must have at most 64 items"),
        (
            {"boxes": [BOX | {"name": -1}]},
            "boxes.0.name must be a label of the model, by its name or its number",
        ),
        ({"boxes": [3]}, "boxes.0 must be an object"),
        ({"loras": {"int": "x"}}, "loras.int must be a number"),
        ({"init_image": 5}, "init_image must be a string"),
        ({"seed": -2}, "seed must be at least -1"),
        ({"seed": 2**64}, f"seed must be at most {2**64 - 1}"),
        ({"timeout": 0}, "timeout must be greater than 0"),
        ({"no.such": 1}, "no.such is not a field of this request"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(body: dict, message: str):
    with pytest.raises(ValidationError) as refused:
        GenerateRequest.model_validate(body)
    assert explain(refused.value.errors()).message == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "task must be one of generate, inpaint, upscale"),
        ({"task": "paint"}, "task must be one of generate, inpaint, upscale"),
        ({"task": "generate", "request": {"steps": 0}}, "request.steps must be at least 1"),
        ({"task": "generate", "request": {"generate": 1}}, "request.generate is not a field of this request"),
        (
            {"task": "upscale", "request": {"image": ""}, "preview_every": 1},
            "preview_every is not a field of this request",
        ),
    ],
)
def test_a_bad_job_is_named_by_its_own_fields(body: dict, message: str):
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(JobRequest).validate_python(body)
    assert explain(refused.value.errors()).message == message


def test_all_types_of_a_union_are_named():
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(dict[str, int | list[int]]).validate_python({"a": "x"}, strict=True)
    assert explain(refused.value.errors()).message == "a must be an integer or a list"


def test_another_content_type_and_a_body_that_is_not_an_object_are_different_errors():
    error = {"type": "model_attributes_type", "loc": ("body",), "msg": "", "input": "secret"}
    assert isinstance(explain([error], "application/json"), UnreadableBody)
    assert isinstance(explain([error], "text/plain"), UnsupportedMedia)
    assert isinstance(explain([error], ""), UnsupportedMedia)

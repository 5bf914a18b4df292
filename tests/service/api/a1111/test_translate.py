from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from service.api.a1111.schemas import TextToImage
from service.api.a1111.translate import split_prompt
from service.errors import InvalidRequest


def test_loras_are_taken_out_of_the_prompt():
    assert split_prompt("a <lora:ink:0.5>cat<lora:dots>") == ("a cat", {"ink": 0.5, "dots": 1.0})
    with pytest.raises(InvalidRequest, match="lora"):
        split_prompt("a cat <lora:ink:much>")


def test_weights_are_numbers_however_long():
    texts = {"": 1.0, ":1": 1.0, ":-.5": -0.5, ":0.25": 0.25, ":" + "1" * 100: float("1" * 100)}
    assert {text: split_prompt(f"<lora:ink{text}>")[1]["ink"] for text in texts} == texts
    for text in (":1.", ":.", ":1e3", ":" + "1" * 1_000_000 + "x"):
        with pytest.raises(InvalidRequest):
            split_prompt(f"<lora:ink{text}>")


@pytest.mark.parametrize("args", [["\ud800"], json.loads("[" * 400 + "]" * 400), [float("inf")]])
def test_values_that_no_answer_can_repeat_are_refused(args):
    with pytest.raises(ValidationError, match="lone surrogates"):
        TextToImage(prompt="apple", script_args=args)
    TextToImage(prompt="apple", script_args=[{"a": 1}]).model_dump_json()


def test_the_limits_are_those_of_the_native_api(bundled):
    answer = bundled.client.post("/sdapi/v1/txt2img", json={"prompt": "apple", "batch_size": 2**33})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "batch_size")

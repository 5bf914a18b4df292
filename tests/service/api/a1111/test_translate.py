from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from service.api.a1111.schemas import TextToImage
from service.api.a1111.translate import check_syntax, split_prompt
from service.errors import InvalidRequest


def test_loras_are_taken_out_of_the_prompt():
    assert split_prompt("a <lora:ink:0.5>cat<lora:dots>") == ("a cat", {"ink": 0.5, "dots": 1.0}, {})
    with pytest.raises(InvalidRequest, match="lora"):
        split_prompt("a cat <lora:ink:much>")


def test_weights_are_numbers_however_long():
    texts = {"": 1.0, ":1": 1.0, ":-.5": -0.5, ":0.25": 0.25, ":" + "1" * 100: float("1" * 100)}
    assert {text: split_prompt(f"<lora:ink{text}>")[1]["ink"] for text in texts} == texts
    for text in (":1.", ":.", ":1e3", ":" + "1" * 1_000_000 + "x"):
        with pytest.raises(InvalidRequest):
            split_prompt(f"<lora:ink{text}>")


@pytest.mark.parametrize(
    ("text", "unet", "text_encoder"),
    [
        (":0.8:0.6", 0.6, 0.8),
        (":0.8:unet=0.6", 0.6, 0.8),
        (":unet=0.6:te=0.8", 0.6, 0.8),
        (":te=.5", 0.5, 0.5),
        (":unet=0", 0.0, 1.0),
    ],
)
def test_a_lora_may_have_its_own_weight_for_text_encoders(text, unet, text_encoder):
    name = "my lora (v2) 墨"
    different = {name: text_encoder} if unet != text_encoder else {}
    assert split_prompt(f"cat<lora:{name}{text}>") == ("cat", {name: unet}, different)


@pytest.mark.parametrize("text", [":1:1:1", ":dyn=4", ":te=x", ":1:x"])
def test_other_options_of_a_lora_are_refused(text):
    with pytest.raises(InvalidRequest, match="text encoder weight"):
        split_prompt(f"cat<lora:ink{text}>")


@pytest.mark.parametrize("args", [["\ud800"], json.loads("[" * 400 + "]" * 400), [float("inf")]])
def test_values_that_no_answer_can_repeat_are_refused(args):
    with pytest.raises(ValidationError, match="lone surrogates"):
        TextToImage(prompt="apple", script_args=args)
    TextToImage(prompt="apple", script_args=[{"a": 1}]).model_dump_json()


def test_the_limits_are_those_of_the_native_api(bundled):
    answer = bundled.client.post("/sdapi/v1/txt2img", json={"prompt": "apple", "batch_size": 2**33})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "batch_size")


@pytest.mark.parametrize(
    "text", ["a cat BREAK a dog", "a cat AND a dog", "[a cat:a dog:0.5]", "[dog:10]", "[cat|dog]"]
)
def test_prompt_syntax_that_would_change_the_image_is_refused(text):
    with pytest.raises(InvalidRequest, match="is not supported") as error:
        check_syntax("prompt", text)
    assert error.value.param == "prompt"


@pytest.mark.parametrize(
    "text", ["[cat]", "(cat:1.2)", "breaking and entering", r"\[cat|dog\]", "a: 1", "[a, b]", "a|b"]
)
def test_other_prompts_are_not(text):
    check_syntax("prompt", text)
    check_syntax("negative_prompt", text + " AND b", but=("AND",))


def test_hostile_prompts_are_checked_quickly():
    for text in ("[" * 100_000, "[a:" * 50_000, "[|" * 50_000, ":1" * 50_000, "[" + "1" * 100_000):
        check_syntax("prompt", text)

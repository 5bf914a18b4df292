from __future__ import annotations

import time

from service.api.a1111 import infotext


def test_an_infotext_is_read_as_it_was_written():
    values = {"Steps": 20, "Sampler": "Euler a", "Size": "512x768", "Model": "a, b: c", "VAE": None}
    text = infotext.write("an apple,\nred", "pear", values)
    *prompts, last = text.split("\n")
    assert prompts == ["an apple,", "red", "Negative prompt: pear"]
    assert last == 'Steps: 20, Sampler: Euler a, Size: 512x768, Model: "a, b: c"'
    assert infotext.parse(text) == {
        "Prompt": "an apple,\nred", "Negative prompt": "pear", "Steps": "20", "Sampler": "Euler a",
        "Size-1": "512", "Size-2": "768", "Model": "a, b: c",
    }  # fmt: skip
    assert infotext.parse("an apple, red: yes") == {}


def test_the_fields_of_a_request_are_read_from_it():
    values = {
        "Steps": 20, "Sampler": "Euler a", "Schedule type": "Karras", "CFG scale": 7.5, "Seed": 5,
        "Size": "512x768", "Model": "a", "Clip skip": 2, "Version": "v1.10.1",
    }  # fmt: skip
    assert infotext.fields_of(infotext.write("an apple", "pear", values)) == {
        "prompt": "an apple", "negative_prompt": "pear", "steps": 20, "sampler_name": "Euler a",
        "scheduler": "Karras", "cfg_scale": 7.5, "seed": 5, "width": 512, "height": 768,
        "override_settings": {"sd_model_checkpoint": "a", "CLIP_stop_at_last_layers": "2"},
    }  # fmt: skip


def test_any_text_is_read_soon():
    begin = time.monotonic()
    for text in (
        "a" * 10**6,
        '"' * 10**6,
        "a:" * 5_000,
        'a b:"' * 2_000,
        "a, " * 3_000,
        " " * 10**4,
        "{" * 10**5,
    ):
        infotext.parameters_of(text)
    assert time.monotonic() - begin < 5

from __future__ import annotations

import io
import time

from PIL import Image

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


def test_a_jpeg_carries_it_as_a_comment():
    exif = Image.Exif()
    text = infotext.write("apple é", "", {"Steps": 1, "Seed": 2, "Sampler": "DDIM"})
    exif.get_ifd(infotext.EXIF_IFD)[infotext.USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "jpeg", exif=exif)
    assert infotext.read(Image.open(file))[0] == text


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

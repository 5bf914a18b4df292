"""CLIP's bundled tokenizer, against ids by other implementations."""

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from models.checkpoint.tokenizers import clip
from tests.helpers.environment import ROOT

# Odd texts and their ids by SimpleTokenizer of open_clip_torch 3.3.0, given texts in NFC, lower case and with
# single spaces. Folders of Stable Diffusion, and so we, do not repair encodings nor unescape HTML first.
KNOWN = json.loads((Path(__file__).parent / "clip_ids.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return clip()


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer) -> Path:
    """A folder as Stable Diffusion 2 and SDXL have it: `transformers` reads it without our help."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    begin, end = "<|startoftext|>", "<|endoftext|>"
    tokens = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": "!"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_photo_of_a_cat(tokenizer):
    assert len(tokenizer) == 49408
    ids = tokenizer("a photo of a cat", padding="max_length", max_length=77)["input_ids"]
    assert ids == [49406, 320, 1125, 539, 320, 2368] + 71 * [49407]


def test_odd_texts_have_the_ids_of_the_reference_tokenizer(tokenizer):
    assert len(KNOWN) > 300
    for text, ids in KNOWN:
        assert tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] == ids, text


def test_padding_with_0_does_to_exclamation_marks_what_published_folders_do(published):
    ours, theirs = clip(pad=0), CLIPTokenizer.from_pretrained(published)
    # The ids of the first are published: github.com/huggingface/diffusers/issues/4153.
    assert ours("! !! !!!", padding="max_length", max_length=9)["input_ids"] == [49406, *6 * [0], 49407, 0]
    for text, _ in KNOWN:
        how = {"padding": "max_length", "max_length": 77, "truncation": True}
        assert ours(text, **how)["input_ids"] == theirs(text, **how)["input_ids"], text


def test_an_unknown_padding_id_is_refused():
    with pytest.raises(ValueError, match="0 to 49407, not 49408"):
        clip(pad=49408)


def test_the_installed_package_contains_the_tokenizer():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    patterns = tool["setuptools"]["package-data"]["*"]
    files = [file for file in (ROOT / "weights" / "tokenizers").rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"merges.txt.gz", "LICENSE.txt"}
    for file in files:
        assert any(fnmatch(file.name, pattern) for pattern in patterns), file

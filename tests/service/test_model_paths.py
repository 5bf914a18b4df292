"""Names and paths given at start-up."""

from __future__ import annotations

import sys

import pytest

from models.checkpoint.conversion import convert
from models.formats import few_step
from service.model_paths import ModelPathError, locate, locate_all, locate_loras
from tests.checkpoints.ldm_files import write


def test_a_single_file_is_named_after_its_stem_or_its_folder(tmp_path):
    for name in ("celeb.safetensors", "faces/model.ckpt", "faces/b.ckpt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert locate(str(tmp_path / "celeb.safetensors")) == ("celeb", tmp_path / "celeb.safetensors")
    for stem, name in (("model", "faces"), ("b", "b")):
        file = tmp_path / "faces" / f"{stem}.ckpt"
        assert locate(str(file), allow_pickle=True) == (name, file)
        with pytest.raises(ModelPathError, match="--allow-pickle"):
            locate(str(file))
    with pytest.raises(ModelPathError, match="no model at"):
        locate(str(tmp_path / "faces"), allow_pickle=True)


def test_a_converted_folder_is_a_model(tmp_path):
    convert(write(tmp_path, "celebahq"), tmp_path / "faces")
    assert locate(str(tmp_path / "faces")) == ("faces", tmp_path / "faces")


def test_a_symbolic_link_is_named_after_the_link(tmp_path, tiny):
    link = tmp_path / "favourite"
    link.symlink_to(tiny, target_is_directory=True)
    assert locate(str(link)) == ("favourite", link)


def test_a_symbolic_link_to_a_file_keeps_its_name_and_suffix(tmp_path):
    blob = tmp_path / "blobs" / "0123abcd"  # as in the cache of Hugging Face
    blob.parent.mkdir()
    blob.touch()
    links = [tmp_path / "base" / "model.safetensors", tmp_path / "ink.safetensors"]
    for link in links:
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(blob)
    assert locate(str(links[0])) == ("base", links[0])
    assert locate_loras([f"ink={links[1]}"]) == {"ink": links[1]}


def test_two_models_of_the_same_name_are_refused(tmp_path, tiny):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same").symlink_to(tiny, target_is_directory=True)
    with pytest.raises(ModelPathError, match="two models are called 'same'"):
        locate_all([str(tmp_path / folder / "same") for folder in ("a", "b")])


def test_a_package_without_the_bundled_models_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "weights", None)  # as if the package did not exist
    with pytest.raises(ModelPathError, match="emoji"):
        locate("emoji")


def test_a_bundled_lora_is_found_by_its_name():
    file = locate_loras(["few=emoji-few-steps"])["few"]
    assert file.is_file()
    assert file.parent.name == "emoji-few-steps"
    assert (found := few_step.of_name(file.parent.name))
    assert (found.sampler, found.steps, found.guidance_scale) == ("lcm", 4, 1.0)

"""A checkpoint is identified once: everything later takes the Source."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from models.checkpoint import load
from models.checkpoint.conversion import convert
from models.checkpoint.inspection import inspect
from models.formats import single_file
from models.formats.identify import identify, is_checkpoint, read_spec
from tests.checkpoints.ldm_files import published, write


def test_the_header_is_read_once_for_everything(tmp_path, monkeypatch):
    headers, original = [], single_file.read_header
    monkeypatch.setattr(single_file, "read_header", lambda *args: headers.append(args) or original(*args))
    source = identify(write(tmp_path, "celebahq"))
    assert load(source).spec == source.spec
    assert not inspect(source).problems
    convert(source, tmp_path / "out")
    assert len(headers) == 1


def test_a_file_that_was_replaced_is_identified_again(tmp_path):
    file = write(tmp_path, "celebahq")
    source = identify(file)
    file.unlink()
    save_file(published("bsr_sr"), file)
    assert load(source).spec == read_spec(file)


@pytest.mark.parametrize(
    ("name", "layout", "family"),
    [
        ("celebahq", "single file", "unconditional VQ"),
        ("cin256-v2", "single file", "class-conditional with guidance"),
        ("inpainting_big", "single file", "inpainting"),
    ],
)
def test_layout_and_family(tmp_path, name, layout, family):
    file = write(tmp_path, name)
    source = identify(file)
    assert (source.layout, source.family, source.file, source.folder) == (layout, family, file, tmp_path)
    convert(source, tmp_path / "out")
    converted = identify(tmp_path / "out")
    assert (converted.layout, converted.family) == ("folder of a single file", family)
    assert is_checkpoint(file)
    assert is_checkpoint(tmp_path / "out")
    assert not is_checkpoint(tmp_path)


def test_names_of_families_in_files_of_earlier_versions_are_read(tmp_path):
    convert(write(tmp_path, "inpainting_big"), tmp_path / "out")
    file = tmp_path / "out" / "ldm.json"
    values = json.loads(file.read_text())
    values["compvis"]["kind"] = "masked picture"
    file.write_text(json.dumps(values))
    assert identify(tmp_path / "out").family == "inpainting"


def test_a_missing_text_encoder_is_a_note(tmp_path):
    source = identify(write(tmp_path, "rdm768"))
    assert source.spec.lacks_text_encoder
    assert "text_encoder/config.json" in source.notes[0]

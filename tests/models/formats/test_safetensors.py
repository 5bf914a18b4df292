"""Headers of safetensors files: what is believed, and what is refused at once."""

import json
import os
import random
import resource
import struct
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.errors import CheckpointError
from models.formats.safetensors import MAX_HEADER_BYTES, Stored, read_safetensors, read_values

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"format": "pt"})
    return tmp_path / "m.safetensors"


def write(file, header, data=b"\0" * 24, length=None):
    """A file with this header, which may be no JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def entry(shape=(6,), offsets=(0, 24), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_header_has_names_types_shapes_and_positions(file):
    header = read_safetensors(file).tensors
    assert {name: (stored.dtype, stored.shape) for name, stored in header.items()} == {
        "a": ("float32", (2, 3)),
        "b": ("float16", (4,)),
    }
    assert np.array_equal(read_values(file, header["a"]), TENSORS["a"].numpy())


def test_a_header_of_640_bytes_begins_like_a_pickle(tmp_path):
    file = tmp_path / "m.safetensors"
    text = json.dumps({"x": entry()}).encode()
    write(file, text + b" " * (640 - len(text)))
    assert file.read_bytes().startswith(b"\x80\x02")
    assert read_safetensors(file).tensors["x"].shape == (6,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_of_every_float_type_are_read(tmp_path, dtype):
    save_file({"x": torch.tensor([0.5, -2.0]).to(dtype)}, tmp_path / "m.safetensors")
    stored = read_safetensors(tmp_path / "m.safetensors").tensors["x"]
    assert read_values(tmp_path / "m.safetensors", stored).tolist() == [0.5, -2.0]


def test_only_small_tensors_of_floats_are_read(file):
    for stored in (Stored("int32", (1,), (1,), 8, 4), Stored("float32", (2**20,), (1,), 8, 2**22)):
        with pytest.raises(CheckpointError, match="expected a few floats"):
            read_values(file, stored)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ({"a": entry(offsets=(0, 20))}, "takes 20 bytes"),
        ({"a": entry(offsets=(4, 28))}, "gap"),
        ({"a": entry(offsets=(24, 0))}, "takes -24 bytes"),
        ({"a": entry(), "b": entry((1,), (20, 24))}, "overlaps"),
        ({"a": entry((3,), (0, 12))}, "end at byte"),
        ({"a": entry((2**40,), (0, 2**42))}, "end at byte"),
        ({"a": entry((2**32, 2**32), (0, 24))}, "takes 24 bytes"),
        ({"a": entry((-6,))}, "whole numbers"),
        ({"a": entry((6.0,))}, "whole numbers"),
        ({"a": entry((True,) * 6)}, "whole numbers"),
        ({"a": entry(offsets=(0, 24, 24))}, "3 data_offsets, expected 2"),
        ({"a": entry(dtype="F33")}, "unknown type"),
        ({"a": entry(dtype=32)}, "unknown type"),
        ({"a": entry() | {"more": 1}}, "no dtype, shape"),
        ({"a": []}, "no dtype, shape"),
        ({"__metadata__": {"format": 1}, "a": entry()}, "__metadata__"),
        ([1], "not an object"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b"{", "corrupt"),
        (b"[" * 100_000, "corrupt"),
        (b"\xff" * 9, "corrupt"),
    ],
)
def test_an_invalid_header_is_a_one_line_error(tmp_path, header, what):
    with pytest.raises(CheckpointError, match=what) as caught:
        read_safetensors(write(tmp_path / "m.safetensors", header))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [100, 2**31, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file_takes_neither_time_nor_memory(tmp_path, length):
    file, begin = write(tmp_path / "m.safetensors", {"a": entry()}, length=length), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=f"would have {length} bytes"):
        read_safetensors(file)
    assert time.monotonic() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_header_as_large_as_a_model_is_refused_unread(tmp_path):
    file = write(tmp_path / "m.safetensors", b"{}", length=MAX_HEADER_BYTES + 1)
    os.truncate(file, 2 * MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match="more than"):
        read_safetensors(file)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (b"\1\2\3", "would have"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"PK\3\4" + bytes(99), "is a pickled checkpoint, although"),
        (b"\x80\x02}q\0." + bytes(99), "is a pickled checkpoint, although"),
        (b"Entry not found, sorry", "corrupt"),
    ],
)
def test_other_contents_of_a_safetensors_file_are_named(tmp_path, content, what):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=what):
        read_safetensors(tmp_path / "m.safetensors")


def test_folders_and_pipes_are_refused_at_once(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("folder", "pipe", "missing"):
        with pytest.raises(CheckpointError, match=r"directory|regular file|No such file"):
            read_safetensors(tmp_path / f"{name}.safetensors")


def test_every_truncation_is_refused(file):
    whole = file.read_bytes()
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="corrupt"):
            read_safetensors(file)


def test_a_flipped_byte_in_a_header_is_refused_or_changes_a_name(file):
    """What is not refused has another name, which strict loading tells; or the byte says nothing."""
    whole, before = file.read_bytes(), read_safetensors(file).tensors
    length, dice = struct.unpack("<Q", whole[:8])[0], random.Random(1)
    for place in range(8 + length):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, dice.randrange(1, 256)):
            damaged = bytearray(whole)
            damaged[place] ^= mask
            file.write_bytes(damaged)
            try:
                after = read_safetensors(file).tensors
            except CheckpointError:
                continue
            same = {name: stored for name, stored in after.items() if name in before}
            for name, stored in same.items():
                assert (stored.shape, stored.start) == (before[name].shape, before[name].start)
                assert (
                    stored.dtype == before[name].dtype or stored.dtype[0] in "iu"
                )  # no float: refused later

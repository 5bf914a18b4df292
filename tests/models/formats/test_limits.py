"""Files that are made to be slow to read are read or rejected within bounded time."""

from __future__ import annotations

import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from models.errors import CheckpointError
from models.formats.config_files import MAX_JSON_BYTES, MAX_YAML_BYTES, read_json, read_yaml
from models.formats.pickle_machine import MAX_OPCODES
from models.formats.pickles import MAX_PICKLE_BYTES, read_pickle
from models.formats.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, read_safetensors

pytestmark = pytest.mark.slow

MAX_SECONDS = 2.5  # of CPU time; most cases take a tenth
MAX_MESSAGE = 1000  # characters
COLLIDING = 2**61 - 1  # multiples of this have the same hash


def refused(read: Callable[[Path], object], file: Path, message: str) -> None:
    """Reading the file raises one short line, soon."""
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        read(file)
    assert time.process_time() - begin < MAX_SECONDS
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < MAX_MESSAGE


def anchors_in_anchors() -> str:
    """Ten lines that stand for 10^9 values."""
    lines = ["a0: &a0 [1]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    return "\n".join(lines)


YAML = {
    "brackets": ("[" * 100_000, "cannot be read"),
    "brackets on lines": ("[\n" * 100_000, "more than 64 levels"),
    "braces": ("{" * 100_000, "cannot be read"),
    "sequences in sequences": ("- " * 100_000, "more than 64 levels"),
    "indentation": ("\n".join(" " * depth + "a:" for depth in range(700)), "more than 64 levels"),
    "documents": ("--- a\n" * 40_000, "10000 values"),
    "values": ("a: 1\n" * 50_000, "10000 values"),
    "anchors in anchors": (anchors_in_anchors(), "refers to other parts"),
    "number in base 60": ("a: 1" + ":0" * 100_000, "more than 4096 characters"),
    "quoted number in base 60": ('a: !!int "1' + ":0" * 100_000 + '"', "more than 4096 characters"),
    "long tag": ("!" * 200_000, "cannot be read"),
    "tag directives": ("".join(f"%TAG !a{i}! tag:x\n" for i in range(10_000)) + "--- a", "YAML object"),
    "too large": ("#" * (MAX_YAML_BYTES + 1), "larger than"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(tmp_path, name):
    text, message = YAML[name]
    (tmp_path / "m.yaml").write_text(text)
    refused(read_yaml, tmp_path / "m.yaml", message)


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"{index * COLLIDING}: 1\n" for index in range(4900)),
        "".join(f"a{index}: 1{':0' * 2000}\n" for index in range(60)),
        'a: "' + "\\x41" * 60_000 + '"',
    ],
    ids=["keys of one hash", "numbers in base 60", "escapes"],
)
def test_large_yaml_is_read_soon(tmp_path, text):
    (tmp_path / "m.yaml").write_text(text)
    begin = time.process_time()
    read_yaml(tmp_path / "m.yaml")
    assert time.process_time() - begin < MAX_SECONDS


JSON = {
    "brackets": ("[" * (MAX_JSON_BYTES // 2), "cannot be read"),
    "objects": ('{"a":' * (MAX_JSON_BYTES // 5), "cannot be read"),
    "integer of a million digits": ('{"a":' + "9" * 1_000_000 + "}", "digits"),
    "infinity": ('{"a": 1e999}', "too large a number"),
    "not a number": ('{"a": NaN}', "NaN is not a JSON value"),
    "too large": (" " * (MAX_JSON_BYTES + 1), "larger than"),
}


@pytest.mark.parametrize("name", JSON)
def test_json(tmp_path, name):
    text, message = JSON[name]
    (tmp_path / "m.json").write_text(text)
    refused(read_json, tmp_path / "m.json", message)


ENTRY = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def tensors(count: int) -> bytes:
    return b"{" + b",".join(b'"%d":%s' % (index, ENTRY) for index in range(count)) + b"}"


HEADERS = {
    "tensors": (lambda: tensors(8 * MAX_TENSORS), "more than 32768 tensors"),
    "brackets": (lambda: b"[" * MAX_HEADER_BYTES, "more than 32768 tensors"),
    "objects": (lambda: b'{"a":' * (MAX_HEADER_BYTES // 5), "more than 32768 tensors"),
    "empty objects": (lambda: b'{"a":[' + b"{}," * 5_000_000 + b"1]}", "more than 32768 tensors"),
    "one name": (
        lambda: b"{" + b",".join([b'"a":' + ENTRY] * (MAX_TENSORS - 9)) + b"}",
        "a name occurs twice",
    ),
    "dimensions": (
        lambda: b'{"a":{"dtype":"F32","shape":[%s1],"data_offsets":[0,0]}}' % (b"999999999999," * 400_000),
        "expected a list of whole numbers",
    ),
    "digits": (lambda: b'{"a":' + b"9" * 16_000_000 + b"}", "digits"),
    "integers": (lambda: b'{"a":[' + b",".join([b"9" * 4000] * 4000) + b"]}", "no dtype, shape"),
    "escaped quotes": (lambda: b'"\\' * (MAX_HEADER_BYTES // 2), "Unterminated string"),
    "quotes": (lambda: b'"' * MAX_HEADER_BYTES, "more than 32768 tensors"),
    "a name of megabytes": (lambda: b'{"' + b"a" * 16_000_000 + b'":1}', "no dtype, shape"),
    "metadata": (
        lambda: b'{"__metadata__":{%s}}' % b",".join(b'"%d":"x"' % i for i in range(10**6)),
        "more than 32768 tensors",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers(tmp_path, name):
    make, message = HEADERS[name]
    header = make()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(read_safetensors, tmp_path / "m.safetensors", message)


def test_as_many_tensors_as_allowed_are_read_soon(tmp_path):
    header, begin = tensors(MAX_TENSORS), time.process_time()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert len(read_safetensors(tmp_path / "m.safetensors").tensors) == MAX_TENSORS
    assert time.process_time() - begin < MAX_SECONDS


def binunicode(length: int, text: bytes) -> bytes:
    return b"X" + struct.pack("<I", length) + text


ORDERED_DICT, REBUILD = b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor\n"
PICKLES = {
    "instructions": (lambda: b"N0" * (MAX_PICKLE_BYTES // 2 - 9), "more than 400000 instructions"),
    "nested tuples": (lambda: b")" + b"\x85" * (MAX_OPCODES - 9), "something other than named tensors"),
    "tuples of twice the same": (lambda: b")" + b"2\x86" * (MAX_OPCODES // 2 - 9), "something other"),
    "nested lists": (lambda: b"]" * (MAX_OPCODES - 9), "more than one value"),
    "integer of megabytes": (lambda: b"\x8b" + struct.pack("<i", 2**23) + b"\xff" * 2**23, "something other"),
    "integer of a million digits": (lambda: b"L" + b"9" * 10**6 + b"L\n", "digits"),
    "keys of one hash": (
        lambda: (
            b"}("
            + b"".join(b"\x8a\x0a" + (i * COLLIDING).to_bytes(10, "little") + b"N" for i in range(190_000))
            + b"u"
        ),
        "something other than named tensors",
    ),
    "memo indexes of one hash": (
        lambda: b"N" + b"".join(b"p%d\n" % (i * COLLIDING) for i in range(300_000)),
        "memo index that is too large",
    ),
    "one list in many dictionaries": (
        lambda: b"]q\0(" + b"]NaNa" * 30_000 + b"e" + ORDERED_DICT + b"q\x010" + b"h\1h\0\x85R0" * 40_000,
        "something other than named tensors",
    ),
    "many arguments": (
        lambda: b"(" + b"N" * 250_000 + b"tq\0" + REBUILD + b"q\1" + b"h\1h\0R0" * 60_000,
        "too many arguments",
    ),
    "a name of megabytes": (lambda: b"c" + b"a." * 2**22 + b"\nx\n", "more than 256 characters"),
    "deep modules": (lambda: (b"c" + b"a." * 100 + b"\nx\n0") * 80_000, "more than 16 levels deep"),
    "a storage's key of megabytes": (
        lambda: (
            b"("
            + binunicode(7, b"storage")
            + b"ctorch\nFloatStorage\n"
            + binunicode(2**23, b"k" * 2**23)
            + binunicode(3, b"cpu")
            + b"K\0tQ"
        ),
        "refers to something that is not a storage",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickle_programs(tmp_path, name):
    make, message = PICKLES[name]
    with zipfile.ZipFile(tmp_path / "m.ckpt", "w") as out:
        out.writestr("archive/data.pkl", b"\x80\x02" + make() + b".")
    refused(read_pickle, tmp_path / "m.ckpt", message)


def directory(count: int, length: int) -> bytes:
    """A zip file whose list has many entries, all at the same place in the file."""
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, length, 0) + b"a" * length
    names = (b"a/%0*d" % (length - 2, index) if length > 2 else b"" for index in range(count))
    head = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, length, 0, 0, 0, 0, 0, 0)
    entries = b"".join(head + name for name in names)
    count = min(count, 65_535)
    return (
        local + entries + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(entries), len(local), 0)
    )


@pytest.mark.parametrize(
    ("count", "length", "message"),
    [
        (300_000, 8, "list of entries would have"),
        (38_000, 8, "no data.pkl"),
        (45_000, 0, "the same name"),
    ],
)
def test_zip_directories(tmp_path, count, length, message):
    (tmp_path / "m.ckpt").write_bytes(directory(count, length))
    refused(read_pickle, tmp_path / "m.ckpt", message)

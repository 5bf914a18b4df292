"""Torch's pickled checkpoints: read as torch reads them, and nothing in them is ever run."""

import collections
import io
import os
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
from argparse import Namespace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint.weights import open_weights
from models.errors import CheckpointError
from models.formats import pickle_machine, pickles
from models.formats.pickle_machine import run
from models.formats.pickles import read_pickle


class Trainer:
    def __init__(self):
        self.best, self.folder, self.mode = 0.5, Path("here"), Mode.LOW


class Mode(Enum):
    LOW = 1


class Evil:
    """Calls a function when a pickle of it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(file, pickled, storages=None, root="archive", **more):
    """A zip file as torch writes it, around a pickle of ours; more: further entries."""
    with zipfile.ZipFile(file, "w") as out:
        out.writestr(f"{root}/data.pkl", pickled)
        for key, data in (storages or {}).items():
            out.writestr(f"{root}/data/{key}", data)
        for name, data in more.items():
            out.writestr(f"{root}/{name}", data)
    return file


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def name(module, text):
    return short(module) + short(text) + b"\x93"


def storage(kind="torch FloatStorage", key="0", count=4, tag="storage"):
    """The instructions that leave a storage on the stack."""
    module, _, kind = kind.partition(" ")
    parts = short(tag) + name(module, kind) + short(key) + short("cpu") + pickle.dumps(count, 2)[2:-1]
    return b"(" + parts + b"t" + b"Q"


def tensor(shape=(2, 2), stride=(2, 1), offset=0, function="torch._utils _rebuild_tensor_v2", **kind):
    numbers = [pickle.dumps(value, 2)[2:-1] for value in (offset, tuple(shape), tuple(stride))]
    module, _, function = function.partition(" ")
    return name(module, function) + b"(" + storage(**kind) + b"".join(numbers) + b"\x89Nt" + b"R"


def state(value, key="w"):
    return b"\x80\x04}" + short(key) + value + b"s."


def written(tmp_path, value, **options):
    torch.save(value, tmp_path / "m.ckpt", **options)
    return tmp_path / "m.ckpt"


def test_tensors_are_as_torch_reads_them(tmp_path):
    base = torch.arange(24.0)
    tensors = {
        "plain": torch.randn(3, 4),
        "turned": torch.randn(3, 4).T,
        "part": base[5:17].reshape(3, 4),
        "other part": base[::2],
        "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(5).bfloat16(),
        "double": torch.randn(5).double(),
        "whole": torch.arange(3),
        "byte": torch.tensor([1, 2, 255], dtype=torch.uint8),
        "truth": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    for value in (tensors, {"state_dict": collections.OrderedDict(tensors)}):
        file = written(tmp_path, value)
        weights, expected = open_weights(file, "cpu", allow_pickle=True), torch.load(file)
        expected = expected.get("state_dict", expected)
        assert list(weights.stored) == list(tensors)
        for key, tensor in expected.items():
            read = weights.read(key)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read, tensor)
            assert weights.stored[key].shape == tensor.shape
            assert f"torch.{weights.stored[key].dtype}" == str(tensor.dtype)


def test_what_is_written_to_a_tensor_does_not_reach_the_file(tmp_path):
    file = written(tmp_path, {"w": torch.zeros(4)})
    open_weights(file, "cpu", allow_pickle=True).read("w").fill_(1)
    assert open_weights(file, "cpu", allow_pickle=True).read("w").tolist() == [0] * 4


def test_a_module_state_with_its_metadata_and_older_protocols(tmp_path):
    weights = torch.nn.Linear(2, 3).state_dict()
    for protocol in (2, 3, 4, 5):
        file = written(tmp_path, {"state_dict": weights}, pickle_protocol=protocol)
        assert {key: stored.shape for key, stored in read_pickle(file).tensors.items()} == {
            "weight": (3, 2),
            "bias": (3,),
        }


def test_objects_of_a_trainer_are_skipped(tmp_path):
    rest = {
        "callbacks": {Trainer: Trainer()},
        "arguments": Namespace(lr=0.1),
        "lr": np.float64(0.1),
        "random": np.random.RandomState(1).get_state(),
        "array": np.arange(3),
        "counts": collections.Counter("aab"),
        "default": collections.defaultdict(list, {1: [2]}),
        "set": {1, 2},
        "frozen": frozenset([3]),
        "pairs": {(1, 2): 3},
        "types": [torch.float32, torch.device("cpu"), torch.Size([1]), 1j, b"x", bytearray(b"y"), slice(1)],
        "optimizer": {
            "state": {0: {"step": 1, "m": torch.ones(3)}},
            "groups": [{"lr": 1e-4, "b": (0.9, 0.99)}],
        },
    }
    file = written(tmp_path, {"state_dict": {"w": torch.ones(2)}} | rest)
    assert list(read_pickle(file).tensors) == ["w"]


PWNED = []


def pwn(*arguments):
    PWNED.append(arguments)


ATTACKS = {
    "os.system": lambda ran: Evil(os.system, f"touch {ran}"),
    "posix.system": lambda ran: b"cposix\nsystem\n" + short(f"touch {ran}") + b"\x85R",
    "eval": lambda ran: Evil(eval, f"open({str(ran)!r}, 'w')"),
    "exec": lambda ran: Evil(exec, f"open({str(ran)!r}, 'w')"),
    "Python 2's eval": lambda ran: b"c__builtin__\neval\n" + short(f"open({str(ran)!r}, 'w')") + b"\x85R",
    "getattr": lambda ran: Evil(getattr, ran, "touch"),
    "getattr's result": lambda ran: Evil(ran.touch),
    "import": lambda ran: Evil(__import__, "os"),
    "subprocess": lambda ran: b"csubprocess\nPopen\n" + short(f"touch {ran}") + b"\x85R",
    "a nested pickle": lambda ran: Evil(pickle.loads, pickle.dumps(Evil(ran.touch))),
    "torch.load": lambda ran: Evil(torch.load, str(ran)),
    "torch.hub": lambda ran: Evil(torch.hub.load, "a/b", "c"),
    "runpy": lambda ran: b"crunpy\nrun_path\n" + short(str(ran)) + b"\x85R",
    "a module's module": lambda ran: name("os.path", "os.system") + short(f"touch {ran}") + b"\x85R",
    "INST": lambda ran: b"(" + short(f"touch {ran}") + b"ios\nsystem\n",
    "OBJ": lambda ran: b"(cos\nsystem\n" + short(f"touch {ran}") + b"o",
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("place", ["beside", "as a weight"])
def test_pickles_that_would_run_code_are_refused(tmp_path, attack, place):
    made = ATTACKS[attack](tmp_path / "ran")
    code = made if isinstance(made, bytes) else pickle.dumps(made, 2)[2:-1]
    weights = b"}" + short("w") + tensor() + b"s"
    whole = (
        b"\x80\x04}"
        + short("state_dict")
        + (weights if place == "beside" else b"}" + short("w") + code + b"s")
    )
    file = archive(tmp_path / "m.ckpt", whole + b"s" + short("x") + code + b"s.", {"0": bytes(16)})
    assert list(read_pickle(archive(tmp_path / "good.ckpt", state(tensor()), {"0": bytes(16)})).tensors) == [
        "w"
    ]
    with pytest.raises(CheckpointError, match="more than tensors"):
        read_pickle(file)
    assert not (tmp_path / "ran").exists()


def test_dotted_names_are_not_looked_up(tmp_path):
    """Python's own reader would go from torch to os to system."""
    code = name("torch", "os.system") + short(f"touch {tmp_path / 'ran'}") + b"\x85R"
    whole = b"\x80\x04}" + short("x") + code + b"s" + short("state_dict") + state(tensor())[2:-1] + b"s."
    assert list(read_pickle(archive(tmp_path / "m.ckpt", whole, {"0": bytes(16)})).tensors) == ["w"]
    assert not (tmp_path / "ran").exists()


def test_harmless_names_are_not_called():
    """They are not refused; still nothing is looked up, called or built."""
    sys.modules["innocent"] = sys.modules[__name__]
    try:
        for instruction in (b")R", b")\x81", b")}\x92", b")R}b", b")\x81}" + short("x") + b"Ksb"):
            code = name("innocent", "pwn") + instruction.replace(b"K", b"K\1")
            value = run(b"\x80\x04" + code + b".")
            assert isinstance(value, pickle_machine.Opaque)
            assert not value.__dict__
    finally:
        del sys.modules["innocent"]
    assert not PWNED


def test_no_module_is_imported_for_a_name(tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    file = archive(tmp_path / "m.ckpt", state(name("trap_module", "Thing")))
    with pytest.raises(CheckpointError, match="something other than named tensors"):
        read_pickle(file)
    assert "trap_module" not in sys.modules


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (tensor(kind="os system"), "more than tensors"),
        (tensor(kind="builtins exec"), "more than tensors"),
        (tensor(kind="torch UntypedStorage"), "not a storage class of torch"),
        (tensor(kind="evil FloatStorage"), "not a storage class of torch"),
        (tensor(kind="torch.evil FloatStorage"), "not a storage class of torch"),
        (tensor(tag="module"), "something that is not a storage"),
        (tensor(key="missing"), "are missing"),
        (tensor(key="../data.pkl"), "are missing"),
        (tensor(key="/etc/passwd"), "are missing"),
        (tensor(count=3), "3 numbers"),
        (tensor(count=2**62), "numbers of float32 in 16 bytes"),
        (tensor(count=-4), "a storage of -4"),
        (tensor(count=4.0), "a storage of 4.0"),
        (tensor(shape=(2, 3), stride=(3, 1)), "exceeds its"),
        (tensor(offset=1), "exceeds its"),
        (tensor(offset=-1), "damaged"),
        (tensor(stride=(-2, 1)), "damaged"),
        (tensor(shape=(2**31, 2**31, 2**31), stride=(0, 0, 0)), "exceeds its"),
        (tensor(shape=(2**40,), stride=(1,)), "exceeds its"),
        (tensor(shape=(5,), stride=(0,)), "exceeds its"),
        (tensor(shape=(4,), stride=(1, 1)), "damaged"),
        (tensor(shape=(1,) * 99, stride=(1,) * 99), "damaged"),
        (tensor(function="torch._utils _rebuild_sparse_tensor"), "something other than named tensors"),
        (tensor(function="torch._utils _rebuild_wrapper_subclass"), "something other than named tensors"),
        (tensor(function="torch._tensor _rebuild_from_type_v2"), "something other than named tensors"),
        (tensor(function="numpy.core.multiarray _reconstruct"), "something other than named tensors"),
        (name("torch._utils", "_rebuild_tensor_v2") + b")R", "damaged"),
        (tensor() + b"}b", "puts something into"),
        (tensor() + b"Na", "puts something into"),
        (tensor() + b")R", "calls something that is not a name"),
        (tensor() + b")\x81", "builds an object from something"),
        (storage(), "something other than named tensors"),
        (b"N", "something other than named tensors"),
        (b"K\1\x85R", "corrupt"),
        (b"\x82\1", "EXT1"),
        (b"Pabc\n", "PERSID"),
        (b"\x97", "NEXT_BUFFER"),
        (b"h\7", "uses a value that does not exist"),
        (b"t", "uses a value that does not exist"),
        (b"00000", "uses a value that does not exist"),
        (b"(a", "uses a value that does not exist"),
        (b"\xff", "corrupt"),
    ],
)
def test_invalid_tensors_are_one_line_errors(tmp_path, value, what):
    file = archive(tmp_path / "m.ckpt", state(value), {"0": bytes(16)})
    with pytest.raises(CheckpointError, match=what) as caught:
        read_pickle(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("whole", [b"\x80\x04N.", b"\x80\x04].", b"\x80\x04}.", b"\x80\x04}K\1K\1s.", b"."])
def test_pickles_of_something_else(tmp_path, whole):
    with pytest.raises(CheckpointError, match=r"something other|not there|corrupt"):
        read_pickle(archive(tmp_path / "m.ckpt", whole))


BOMBS = {  # what leaves one value, and the error if there is one
    "a memo of 2**31 places": (b"Nr\xff\xff\xff\x7f", None),
    "bytes of 2**62": (b"\x8e" + struct.pack("<Q", 2**62), "corrupt"),
    "a text of 2**62": (b"\x8d" + struct.pack("<Q", 2**62), "corrupt"),
    "a bytearray of 2**62": (b"\x96" + struct.pack("<Q", 2**62), "corrupt"),
    "a frame of 2**62": (b"\x95" + struct.pack("<Q", 2**62) + b"N", None),
    "bytearray(2**40)": (name("builtins", "bytearray") + pickle.dumps((2**40,), 2)[2:-1] + b"R", None),
    "list(range(2**40))": (name("builtins", "list") + name("builtins", "range") + b"K\1\x85R\x85R", None),
    "lists in lists": (b"]" * 150_000 + b"a" * 149_999, None),
    "tuples in tuples as a key": (b"}" + b")" + b"\x85" * 300_000 + b"Ns", None),
    "tuples in tuples in a set": (b"\x8f(" + b")" + b"\x85" * 300_000 + b"\x90", None),
    "a laugh in 60 tuples": (b")" + b"2\x86" * 60, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_large_claims_and_deep_nesting_take_little_memory(tmp_path, bomb):
    (code, error), weights = BOMBS[bomb], b"}" + short("w") + tensor() + b"s"
    whole = b"\x80\x04}" + short("state_dict") + weights + b"s" + short("x") + code + b"s."
    file = archive(tmp_path / "m.ckpt", whole, {"0": bytes(16)})
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if error:
        with pytest.raises(CheckpointError, match=error):
            read_pickle(file)
    else:
        assert list(read_pickle(file).tensors) == ["w"]
    assert time.monotonic() - begin < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_storage_under_many_names_is_no_larger_than_the_file(tmp_path):
    """Each of them would be copied when its type changes."""
    names = b"".join(
        short(f"w{i}") + (b"h\0" if i else tensor((1024,), (1,), count=1024) + b"q\0") + b"s"
        for i in range(99)
    )
    with pytest.raises(CheckpointError, match="would take 405504 bytes"):
        read_pickle(archive(tmp_path / "m.ckpt", b"\x80\x04}" + names + b".", {"0": bytes(4096)}))


def test_an_encrypted_zip_is_refused(tmp_path):
    file = archive(tmp_path / "m.ckpt", state(tensor()), {"0": bytes(4)})
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the first entry's flags in the central directory
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="encrypted"):
        read_pickle(file)


def test_zip_bombs_and_foreign_zips(tmp_path):
    file = tmp_path / "m.ckpt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("archive/data.pkl", state(tensor()))
        out.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(CheckpointError, match="compressed"):
        read_pickle(file)
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("word/document.xml", "x")
    with pytest.raises(CheckpointError, match=r"no data.pkl"):
        read_pickle(file)
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("a/data.pkl", state(tensor()))
        out.writestr("../../../../tmp/b", "x")
    with pytest.raises(CheckpointError, match="not in one folder"):
        read_pickle(file)
    assert not Path("/tmp/b").exists()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("archive/data.pkl", state(tensor()))
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("archive/data.pkl", state(tensor()))
    with pytest.raises(CheckpointError, match="the same name"):
        read_pickle(file)
    with pytest.raises(CheckpointError, match="little-endian"):
        read_pickle(archive(file, state(tensor()), {"0": bytes(16)}, byteorder=b"big"))


def test_a_list_of_entries_of_gigabytes_is_not_read(tmp_path):
    file = archive(tmp_path / "m.ckpt", state(tensor()), {"0": bytes(16)})
    data = bytearray(file.read_bytes())
    struct.pack_into("<L", data, data.rindex(b"PK\5\6") + 12, 2**31)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="list of entries would have"):
        read_pickle(file)


def test_a_pickle_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="has 2000 bytes, more than 1000"):
        read_pickle(archive(tmp_path / "m.ckpt", b"N" * 2000))


def test_files_of_torch_before_1_6(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    state = {"state_dict": {"a": weight, "b": weight.T[1:], "c": torch.ones(2).half()}, "global_step": 3}
    file = written(tmp_path, state, _use_new_zipfile_serialization=False)
    weights = open_weights(file, "cpu", allow_pickle=True)
    assert weights.stored.keys() == state["state_dict"].keys()
    assert all(torch.equal(weights.read(key), value) for key, value in state["state_dict"].items())
    content = file.read_bytes()
    for damaged in (content[:-1], content[:200]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            read_pickle(file)
    file.write_bytes(content.replace(b"torch._utils\n_rebuild_tensor_v2", b"posix\nsystem"))
    with pytest.raises(CheckpointError, match="contains more than tensors"):
        read_pickle(file)


def test_numbers_and_texts_among_the_tensors_are_skipped(tmp_path):
    state = {
        "w": torch.ones(2),
        "global_step": 3,
        "recipe": "a + b",
        "optimizer": {"lr": [0.1]},
        "loss": None,
    }
    assert read_pickle(written(tmp_path, state)).tensors.keys() == {"w"}


def test_other_formats_are_named(tmp_path):
    file = tmp_path / "m.ckpt"
    with tarfile.open(file, "w") as out:
        out.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(CheckpointError, match="tar archive"):
        read_pickle(file)
    contents = {
        b"": "it is empty",
        b"version https://git-lfs.github.com/spec/v1": "Git LFS pointer",
        b"<html>": "web page",
        pickle.dumps({"w": 1}): "not a zip file",
        b"\x10" + bytes(7) + b'{"a": 1}        ': "is a safetensors file",
        b"PK\3\4" + bytes(99): "corrupt",
    }
    for content, what in contents.items():
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=what):
            read_pickle(file)


def test_truncated_and_damaged_files_are_refused(tmp_path):
    file = written(tmp_path, {"w": torch.ones(2, 3)})
    whole = file.read_bytes()
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"corrupt|not a zip file"):
            read_pickle(file)
    start = whole.index(b"\x80\x02")
    for place in range(start, whole.index(b".", start + 40)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"CRC"):
            read_pickle(file)

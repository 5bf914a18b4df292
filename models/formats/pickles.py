"""Torch's pickled checkpoints, without torch and without unpickling: where their tensors lie in the file.

A pickle is a program for a stack machine. This machine makes plain containers and records of tensors, and has
no instruction that calls, imports or looks anything up: a name stays a name, and whatever a name would be
called or built with becomes an `Opaque`. So a trainer's objects, which published files hold beside the
weights, cost nothing, and files that name what could only do harm are refused, not because it would run but
because nobody wants them.

torch's own reader of weights is not used: it reads all that there is, makes what a file says is large, knows
a trainer's objects only through a list for the whole process, and was got round before (CVE-2025-32434,
CVE-2026-24747).
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import CheckpointError
from models.formats.safetensors import HEADER_LIMIT, SIZES, ZIP, Stored, opened, sniff

STORAGES = {  # torch's classes of storages -> the type of their numbers
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip
HARMFUL = frozenset(  # modules that no checkpoint needs
    {
        "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "ctypes", "importlib", "runpy", "code",
        "pickle", "_pickle", "marshal", "types.CodeType", "types.FunctionType", "webbrowser", "pty",
        "commands", "multiprocessing", "asyncio", "urllib", "http", "requests", "pip", "pdb", "bdb",
        "timeit", "cProfile", "profile", "torch.hub", "torch.load", "torch.jit", "torch.package",
        "torch.serialization", "torch.utils.cpp_extension",
    }
)  # fmt: skip
HARMLESS_BUILTINS = frozenset(
    {"set", "frozenset", "list", "dict", "tuple", "int", "float", "complex", "bool", "str", "bytes",
     "bytearray", "object", "slice", "range"}
)  # fmt: skip
OLDER = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch before 1.6
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of an entry in a zip file
DIRECTORY_ENDS = ((b"PK\x05\x06", 12, "<L", 22), (b"PK\x06\x06", 40, "<Q", 56))  # mark, size's place and form
TIMES = 4  # that all tensors together may be as large as the file: a few share their numbers


@dataclass(frozen=True, eq=False)
class Name:
    """What a pickle would import."""

    text: str


class Harmful(Exception):  # noqa: N818 - what it says is one, not that it failed
    """A name that no checkpoint needs."""


class Opaque:
    """Whatever a pickle would make with a name: nothing."""


@dataclass(frozen=True, eq=False)
class Storage:
    """Numbers in an entry of the file."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, eq=False)
class Record:
    """A tensor: which of a storage's numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_records(file: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint that torch.save wrote, alone or under `state_dict`.

    Runs nothing, and reads the pickle and the list of entries only. Raises CheckpointError.
    """
    with opened(file) as (stream, size):
        refuse_others(file, sniff(file, stream, size))
        try:
            check_directory(stream, size)
            with zipfile.ZipFile(stream) as archive:
                entries = entries_of(archive)
                records = named_records(file, run(pickle_of(archive, entries)))
                places = {key: place(stream, entry, size) for key, entry in entries.items()}
        except Harmful as error:
            raise CheckpointError(f"{file} holds more than tensors: it names {error}") from error
        except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, IndexError) as error:
            raise ValueError(str(error) or "it ends too early") from error
        stored = {name: stored_of(name, record, places) for name, record in records.items()}
        if (total := sum(entry.bytes for entry in stored.values())) > TIMES * size:
            raise ValueError(f"its tensors would take {total} bytes, the file has {size}")
        return stored


def refuse_others(file: Path, head: bytes) -> None:
    """Say what a file is that is no zip file."""
    if head.startswith(ZIP):
        return
    if head.startswith(OLDER):
        raise CheckpointError(f"{file} has the form of torch before 1.6; load and save it with a newer torch")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{file} is a tar archive, not a checkpoint of torch")
    if head[8:9] == b"{":
        raise CheckpointError(f"{file} is a safetensors file by its contents; give it that ending")
    raise CheckpointError(f"{file} is no checkpoint of torch: no zip file")


def check_directory(stream: io.BufferedIOBase, size: int) -> None:
    """Raise ValueError for a list of entries that would take much memory. Both of its forms are looked at."""
    stream.seek(max(0, size - 2**16 - 128))
    tail = stream.read()
    for mark, offset, form, length in DIRECTORY_ENDS:
        at = tail.find(mark)
        while at >= 0:
            if at + length <= len(tail):
                claimed = struct.unpack_from(form, tail, at + offset)[0]
                if claimed > HEADER_LIMIT and claimed != 2**32 - 1:
                    raise ValueError(f"its list of entries would have {claimed} bytes")
            at = tail.find(mark, at + 1)


def entries_of(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Name below the archive's one folder -> entry. Raises ValueError for what torch does not write."""
    infos = archive.infolist()
    roots = {info.filename.partition("/")[0] for info in infos}
    if len(roots) != 1:
        raise ValueError("a zip file, but not of one folder as torch writes it")
    entries = {info.filename.partition("/")[2]: info for info in infos}
    if len(entries) != len(infos):
        raise ValueError("two of its entries have one name")
    if "data.pkl" not in entries:
        raise ValueError("a zip file without data.pkl: no checkpoint of torch")
    for name, info in entries.items():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its entry {name!r} is compressed, which torch's never are")
    if "byteorder" in entries and read_entry(archive, entries["byteorder"], 16) != b"little":
        raise ValueError("its numbers are not little-endian")
    return entries


def pickle_of(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> bytes:
    return read_entry(archive, entries["data.pkl"], HEADER_LIMIT)


def read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """An entry's bytes, whose checksum zipfile checks. Raises ValueError for more than `limit`."""
    if info.file_size > limit:
        raise ValueError(f"its entry {info.filename!r} would have {info.file_size} bytes, more than {limit}")
    return archive.read(info)


def place(stream: io.BufferedIOBase, entry: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """First byte and length of an entry's data in the file."""
    stream.seek(entry.header_offset)
    mark, *_, name, extra = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
    start = entry.header_offset + LOCAL_HEADER.size + name + extra
    if mark != ZIP or start + entry.file_size > size:
        raise ValueError(f"its entry {entry.filename!r} lies outside of the file")
    return start, entry.file_size


def named_records(file: Path, value: Any) -> dict[str, Record]:
    """The state dict in what a pickle held."""
    for inner in ("state_dict", "string_to_param"):  # the latter holds a learned word's vectors
        if isinstance(value, dict) and isinstance(value.get(inner), dict):
            value = value[inner]
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{file} holds something else than named tensors")
    for key, record in value.items():
        if not isinstance(key, str) or not isinstance(record, Record):
            named = key if isinstance(key, str) else type(key).__name__
            raise CheckpointError(f"{file} holds something else than named tensors: {named[:80]!r}")
    return value


def stored_of(name: str, record: Record, places: dict[str, tuple[int, int]]) -> Stored:
    """Where a tensor lies. Raises ValueError where its storage does not hold it."""
    storage, shape, stride = record.storage, record.shape, record.stride
    if f"data/{storage.key}" not in places:
        raise ValueError(f"the numbers of {name!r} are missing")
    start, length = places[f"data/{storage.key}"]
    width = SIZES[storage.dtype]
    if storage.count * width != length:
        raise ValueError(f"{name!r} has {storage.count} numbers of {storage.dtype} in {length} bytes")
    count, reach = 1, 1  # numbers, and from the first to the last
    for side, step in zip(shape, stride, strict=True):
        count, reach = count * side, reach + (side - 1) * step
    reach = reach if count else 0
    if record.offset + reach > storage.count or count > storage.count:
        raise ValueError(f"{name!r} of shape {shape} reaches beyond its {storage.count} numbers")
    return Stored(storage.dtype, shape, stride, start + record.offset * width, reach * width)


# The machine.

MARK = object()
# What may name a value. Not tuples: those in tuples in tuples, and so on, have a hash that ends the process.
KEYS = (str, int, float, bool, bytes, type(None), Name, Opaque)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
        "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    }
)  # fmt: skip
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
SIZED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


def run(data: bytes) -> Any:
    """What a pickle holds. Raises ValueError for one that is damaged or asks for what torch's never do."""
    machine = Machine()
    for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
        machine.turn(opcode.name, argument)
    if len(machine.stack) != 1:
        raise ValueError("its pickle leaves more than one value")
    return machine.stack[0]


class Machine:
    """A stack and a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise ValueError("its pickle takes what is not there")
        return self.stack.pop()

    def popped(self) -> list[Any]:
        """Everything above the last mark, which goes too."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise ValueError("its pickle takes what is not there")

    def turn(self, name: str, argument: Any) -> None:
        """One instruction."""
        push = self.stack.append
        if name in VALUES:
            push(argument)
        elif name in CONSTANTS:
            push(CONSTANTS[name])
        elif name in EMPTY:
            push(EMPTY[name]())
        elif name == "MARK":
            push(MARK)
        elif name in PUTS:
            self.memo[argument] = self.peek()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.peek()
        elif name in GETS:
            if argument not in self.memo:
                raise ValueError("its pickle takes what is not there")
            push(self.memo[argument])
        elif name in SIZED:
            push(tuple([self.pop() for _ in range(SIZED[name])][::-1]))
        elif name in ("PROTO", "FRAME", "STOP"):
            pass
        else:
            step = getattr(self, f"on_{name.lower()}", None)  # of opcodes that pickletools knows
            if step is None:
                raise ValueError(f"its pickle has the instruction {name}, which torch's never have")
            step(argument)

    def peek(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def on_pop(self, _: Any) -> None:
        self.pop()

    def on_pop_mark(self, _: Any) -> None:
        self.popped()

    def on_dup(self, _: Any) -> None:
        self.stack.append(self.peek())

    def on_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.popped()))

    def on_list(self, _: Any) -> None:
        self.stack.append(self.popped())

    def on_dict(self, _: Any) -> None:
        values = self.popped()
        self.stack.append({})
        self.set_items(values)

    def on_empty_set(self, _: Any) -> None:
        self.stack.append(Opaque())

    def on_frozenset(self, _: Any) -> None:
        self.popped()
        self.stack.append(Opaque())

    def on_additems(self, _: Any) -> None:
        self.popped()
        self.expect(Opaque)

    def on_append(self, _: Any) -> None:
        self.extend([self.pop()])

    def on_appends(self, _: Any) -> None:
        self.extend(self.popped())

    def on_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def on_setitems(self, _: Any) -> None:
        self.set_items(self.popped())

    def on_build(self, _: Any) -> None:
        """A state, which nothing here has."""
        self.pop()
        self.expect(Opaque, dict)

    def on_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(named(module, name))

    def on_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("its pickle takes something else than a text for a name")
        self.stack.append(named(module, name))

    def on_inst(self, argument: str) -> None:
        self.popped()
        self.on_global(argument)
        self.stack[-1] = Opaque()

    def on_obj(self, _: Any) -> None:
        if not (values := self.popped()) or not isinstance(values[0], Name):
            raise ValueError("its pickle builds from something else than a name")
        self.stack.append(Opaque())

    def on_newobj(self, _: Any) -> None:
        arguments, kind = self.pop(), self.pop()
        if not isinstance(kind, Name) or not isinstance(arguments, tuple):
            raise ValueError("its pickle builds from something else than a name")
        self.stack.append(Opaque())

    def on_newobj_ex(self, _: Any) -> None:
        self.pop()
        self.on_newobj(None)

    def on_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls something else than a name")
        self.stack.append(CALLS[function.text](*arguments) if function.text in CALLS else Opaque())

    def on_binpersid(self, _: Any) -> None:
        self.stack.append(storage_of(self.pop()))

    def expect(self, *kinds: type) -> Any:
        value = self.peek()
        if not isinstance(value, kinds):
            raise ValueError(f"its pickle puts something into a value of type {type(value).__name__}")
        return value

    def extend(self, values: list[Any]) -> None:
        target = self.expect(list, Opaque)
        if isinstance(target, list):
            target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.expect(dict, Opaque)
        if len(values) % 2:
            raise ValueError("its pickle takes what is not there")
        if isinstance(target, dict):
            pairs: Iterable[tuple[Any, Any]] = zip(values[::2], values[1::2], strict=True)
            target.update((key if type(key) in KEYS else Opaque(), value) for key, value in pairs)


def named(module: str, name: str) -> Name:
    """Raises Harmful."""
    parts = module.split(".")
    above = {".".join(parts[: index + 1]) for index in range(len(parts))} | {f"{module}.{name}"}
    builtin = module in ("builtins", "__builtin__") and name not in HARMLESS_BUILTINS
    if builtin or above & HARMFUL:
        raise Harmful(f"{module}.{name}"[:80])
    return Name(f"{module}.{name}")


def storage_of(value: Any) -> Storage:
    """From ('storage', class, key, device, count)."""
    tag, kind, key, _, count, *rest = value if isinstance(value, tuple) and len(value) >= 5 else (None,) * 5
    if tag != "storage" or rest or not isinstance(kind, Name) or not isinstance(key, str):
        raise ValueError("its pickle refers to something else than a storage")
    module, _, name = kind.text.rpartition(".")
    if module != "torch" or name not in STORAGES:
        raise ValueError(f"its numbers are of the class {kind.text[:80]}, which is no storage of torch's")
    if not natural(count):
        raise ValueError(f"a storage of {str(count)[:80]} numbers")
    return Storage(key, STORAGES[name], count)


def natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def tensor(storage: Any = None, offset: Any = None, shape: Any = None, stride: Any = None, *_: Any) -> Record:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    whole = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 64
    if not isinstance(storage, Storage) or not whole or not all(map(natural, (offset, *shape, *stride))):
        raise ValueError("a tensor of its pickle is damaged")
    return Record(storage, offset, shape, stride)


def parameter(data: Any = None, *_: Any) -> Any:
    """torch._utils._rebuild_parameter."""
    return data


def ordered(*pairs: Any) -> dict[Any, Any]:
    """collections.OrderedDict, of nothing; items follow. Older ones come as a list of pairs."""
    if pairs and not (len(pairs) == 1 and isinstance(pairs[0], list)):
        raise ValueError("a dictionary of its pickle is damaged")
    out: dict[Any, Any] = {}
    for pair in pairs[0] if pairs else []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("a dictionary of its pickle is damaged")
        out[pair[0] if type(pair[0]) in KEYS else Opaque()] = pair[1]
    return out


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_parameter": parameter,
    "collections.OrderedDict": ordered,
}

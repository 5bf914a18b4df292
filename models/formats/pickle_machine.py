"""Reads pickles without unpickling: as data, in bounded time and memory.

A pickle is a program for a stack machine. This machine makes plain containers and records of tensors, and has
no instruction that calls, imports or looks anything up. A name stays a name, and an object that would be
built by calling it becomes an `Opaque`: this skips a trainer's objects, which published files contain next to
the weights. Files that name harmful modules are refused, although nothing would run: no checkpoint needs
these modules.

torch's own reader of weights is not used: it reads the complete file, allocates what the file claims, knows a
trainer's objects only through a list for the whole process, and was bypassed before (CVE-2025-32434,
CVE-2026-24747).
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from models.formats.config_files import shortened
from models.formats.safetensors import ITEM_SIZES

MAX_OPCODES = 400_000  # torch writes 38 for a tensor
MAX_NAME = 256  # characters of a module and a name in it
MAX_MODULE_DEPTH = 16
MAX_ARGUMENTS = 16  # of a call; torch's have at most 7
MAX_DIMENSIONS = 64
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"

STORAGES = {  # torch's storage classes -> the type of their numbers
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
BYTES_STORAGE = "torch.storage.UntypedStorage"  # of types that have no class: a tensor names the type itself
TYPES = {f"torch.{name}": name for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")}
HARMFUL_TEXT = """
os posix nt sys subprocess shutil socket ctypes importlib runpy code pickle _pickle marshal
types.CodeType types.FunctionType webbrowser pty commands multiprocessing asyncio urllib http
requests pip pdb bdb timeit cProfile profile torch.hub torch.load torch.jit torch.package
torch.serialization torch.utils.cpp_extension
"""  # modules that no checkpoint needs
HARMFUL = frozenset(HARMFUL_TEXT.split())
HARMLESS_BUILTINS_TEXT = """
set frozenset list dict tuple int float complex bool str bytes bytearray object slice range
"""
HARMLESS_BUILTINS = frozenset(HARMLESS_BUILTINS_TEXT.split())


class HarmfulNameError(Exception):
    """A pickle names something that no checkpoint needs."""


@dataclass(frozen=True, eq=False)
class Name:
    """The name of something that unpickling would import."""

    text: str


class Opaque:
    """Stands for an object that unpickling would build; nothing is built."""


class Parameters(dict[Any, Any]):
    """torch's nn.ParameterDict: its parameters by name."""


@dataclass(frozen=True, eq=False)
class Storage:
    """Numbers in an entry of the file."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A tensor: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def run(data: bytes) -> Any:
    """The value of a pickle; raises as run_next()."""
    return run_next(io.BytesIO(data), {})


def run_next(stream: BinaryIO, storages: dict[str, Storage]) -> Any:
    """The value of the pickle at a stream's position, which is then behind it; adds its storages, by key.

    Raises ValueError for one that is damaged, has very many instructions, or some that torch never writes;
    HarmfulNameError for a harmful name.
    """
    machine = Machine(storages)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count >= MAX_OPCODES:
            raise ValueError(f"its pickle has more than {MAX_OPCODES} instructions")
        machine.execute(opcode.name, argument)
    if len(machine.stack) != 1:
        raise ValueError("its pickle leaves more than one value")
    return machine.stack[0]


MARK = object()
MISSING = "its pickle uses a value that does not exist"
# Types of dictionary keys. Not tuples: hashing deeply nested ones ends the process.
KEY_TYPES = (str, int, float, bool, bytes, type(None), Name, Opaque)
MAX_KEY = 2**60  # larger integers can all have one hash, which makes dictionaries slow
MAX_MEMO = 2**32
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS_TEXT = """
INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE
SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
"""
LITERALS = frozenset(LITERALS_TEXT.split())
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
IGNORED = frozenset({"PROTO", "FRAME", "STOP"})


class Machine:
    """A stack and a memo. Methods on_... execute the instruction of that name."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise ValueError(MISSING)
        return self.stack.pop()

    def peek(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise ValueError(MISSING)
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        """Removes everything down to the last mark, and the mark; returns what was above it."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise ValueError(MISSING)

    def execute(self, name: str, argument: Any) -> None:
        """Execute one instruction."""
        push = self.stack.append
        if name in LITERALS:
            push(argument)
        elif name in PUTS:
            self.put(argument)
        elif name in GETS:
            if argument not in self.memo:
                raise ValueError(MISSING)
            push(self.memo[argument])
        elif name == "MARK":
            push(MARK)
        elif name in TUPLE_SIZES:
            push(tuple([self.pop() for _ in range(TUPLE_SIZES[name])][::-1]))
        elif name in CONSTANTS:
            push(CONSTANTS[name])
        elif name in EMPTY:
            push(EMPTY[name]())
        elif name == "MEMOIZE":
            self.put(len(self.memo))
        elif name not in IGNORED:
            method = getattr(self, f"on_{name.lower()}", None)  # name: one that pickletools knows
            if method is None:
                raise ValueError(f"its pickle has the instruction {name}, which torch's never have")
            method(argument)

    def put(self, index: int) -> None:
        if not 0 <= index < MAX_MEMO:
            raise ValueError("its pickle has a memo index that is too large")
        self.memo[index] = self.peek()

    def on_pop(self, _: Any) -> None:
        self.pop()

    def on_pop_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def on_dup(self, _: Any) -> None:
        self.stack.append(self.peek())

    def on_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def on_list(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def on_dict(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self.set_items(values)

    def on_empty_set(self, _: Any) -> None:
        self.stack.append(Opaque())

    def on_frozenset(self, _: Any) -> None:
        self.pop_to_mark()
        self.stack.append(Opaque())

    def on_additems(self, _: Any) -> None:
        self.pop_to_mark()
        self.expect(Opaque)

    def on_append(self, _: Any) -> None:
        self.extend([self.pop()])

    def on_appends(self, _: Any) -> None:
        self.extend(self.pop_to_mark())

    def on_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def on_setitems(self, _: Any) -> None:
        self.set_items(self.pop_to_mark())

    def on_build(self, _: Any) -> None:
        """Drops the state of an object; a ParameterDict keeps its parameters."""
        state, target = self.pop(), self.expect(Opaque, dict)
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(target, Parameters) and isinstance(parameters, dict) and parameters is not target:
            target.update(parameters)
            parameters.clear()  # so that a dictionary that the memo keeps is copied once

    def on_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(checked_name(module, name))

    def on_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("its pickle has a name that is not text")
        self.stack.append(checked_name(module, name))

    def on_inst(self, argument: str) -> None:
        self.pop_to_mark()
        self.on_global(argument)
        self.stack[-1] = Opaque()

    def on_obj(self, _: Any) -> None:
        if not (values := self.pop_to_mark()) or not isinstance(values[0], Name):
            raise ValueError("its pickle builds an object from something that is not a name")
        self.stack.append(Opaque())

    def on_newobj(self, _: Any) -> None:
        arguments, kind = self.pop(), self.pop()
        if not isinstance(kind, Name) or not isinstance(arguments, tuple):
            raise ValueError("its pickle builds an object from something that is not a name")
        self.stack.append(Parameters() if kind.text == PARAMETER_DICT else Opaque())

    def on_newobj_ex(self, _: Any) -> None:
        self.pop()
        self.on_newobj(None)

    def on_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls something that is not a name")
        if (call := CALLS.get(function.text)) is None:
            self.stack.append(Opaque())
        elif len(arguments) > MAX_ARGUMENTS:
            raise ValueError("its pickle calls a function with too many arguments")
        else:
            self.stack.append(call(*arguments))

    def on_binpersid(self, _: Any) -> None:
        found = storage(self.pop())
        self.storages[found.key] = found
        self.stack.append(found)

    def expect(self, *kinds: type) -> Any:
        """The value on top of the stack, of one of these types."""
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
            raise ValueError(MISSING)
        if isinstance(target, dict):
            for key, value in zip(values[::2], values[1::2], strict=True):
                target[dict_key(key)] = value


def dict_key(value: Any) -> Any:
    """A value as a key that is quick to look up."""
    if type(value) not in KEY_TYPES or (type(value) is int and abs(value) >= MAX_KEY):
        return Opaque()
    return value


def checked_name(module: str, name: str) -> Name:
    """A name that is not harmful. Raises HarmfulNameError for others."""
    if len(module) + len(name) > MAX_NAME:
        raise ValueError(f"its pickle has a name of more than {MAX_NAME} characters")
    parts = module.split(".")
    if len(parts) > MAX_MODULE_DEPTH:
        raise ValueError(f"its pickle names a module more than {MAX_MODULE_DEPTH} levels deep")
    ancestors = {".".join(parts[: index + 1]) for index in range(len(parts))} | {f"{module}.{name}"}
    harmful_builtin = module in ("builtins", "__builtin__") and name not in HARMLESS_BUILTINS
    if harmful_builtin or ancestors & HARMFUL:
        raise HarmfulNameError(f"{module}.{name}")
    return Name(f"{module}.{name}")


def storage(value: Any) -> Storage:
    """The storage that ('storage', class, key, device, count) refers to.

    Before torch 1.6 a sixth value said of which part of another storage it was; it must be None.
    """
    if isinstance(value, tuple) and len(value) == 6 and value[5] is None:
        value = value[:5]
    valid = isinstance(value, tuple) and len(value) == 5
    tag, kind, key, _, count = value if valid else (None,) * 5
    if tag != "storage" or not isinstance(kind, Name) or not isinstance(key, str) or len(key) > MAX_NAME:
        raise ValueError("its pickle refers to something that is not a storage")
    module, _, name = kind.text.rpartition(".")
    if kind.text == BYTES_STORAGE and isinstance(count, int) and is_natural(count):
        return Storage(key, "uint8", count)
    if module != "torch" or name not in STORAGES:
        raise ValueError(f"{kind.text} is not a storage class of torch")
    if not isinstance(count, int) or not is_natural(count):
        raise ValueError(f"a storage of {shortened(count)} numbers")
    return Storage(key, STORAGES[name], count)


def is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def tensor(
    storage: Any = None, offset: Any = None, shape: Any = None, stride: Any = None, *_: Any
) -> TensorRecord:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    tuples = isinstance(shape, tuple) and isinstance(stride, tuple)
    valid = tuples and len(shape) == len(stride) <= MAX_DIMENSIONS
    if not isinstance(storage, Storage) or not valid or not all(map(is_natural, (offset, *shape, *stride))):
        raise ValueError("a tensor of its pickle is damaged")
    return TensorRecord(storage, offset, shape, stride)


def typed_tensor(
    storage: Any = None, offset: Any = None, shape: Any = None, stride: Any = None, *rest: Any
) -> TensorRecord:
    """torch._utils._rebuild_tensor_v3, which gives the type after the gradient and the hooks."""
    record = tensor(storage, offset, shape, stride)
    kind = rest[2] if len(rest) > 2 else None
    dtype = TYPES.get(kind.text) if isinstance(kind, Name) else None
    width = ITEM_SIZES.get(dtype or "", 0)
    if dtype is None or record.storage.dtype != "uint8" or record.storage.count % width:
        raise ValueError("a tensor of its pickle has an unknown type")
    return replace(record, storage=replace(record.storage, dtype=dtype, count=record.storage.count // width))


def parameter(data: Any = None, *_: Any) -> Any:
    """torch._utils._rebuild_parameter."""
    return data


def ordered_dict(*arguments: Any) -> dict[Any, Any]:
    """collections.OrderedDict. Its items usually follow; old files pass a list of pairs."""
    if arguments and not (len(arguments) == 1 and isinstance(arguments[0], list)):
        raise ValueError("a dictionary of its pickle is damaged")
    pairs, out = arguments[0] if arguments else [], {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("a dictionary of its pickle is damaged")
        out[dict_key(pair[0])] = pair[1]
    pairs.clear()  # so that a list that the memo keeps is read once
    return out


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": typed_tensor,
    "torch._utils._rebuild_parameter": parameter,
    "collections.OrderedDict": ordered_dict,
}

"""The messages between the API process and the worker, and the one codec for them.

A message is a frame: a magic number, two lengths, a JSON text and raw bytes. The text is [kind, job or null,
fields, sizes of the byte strings]; the values of `bytes` fields follow the text as raw bytes. The annotations
of a class decide how its fields are encoded, and decoding checks every value against them. The next frame is
found by the lengths alone, so a frame with unreadable content costs that message only.
"""

from __future__ import annotations

import asyncio
import json
import struct
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import accumulate
from typing import Any, BinaryIO, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from models.spec import ModelSpec
from service.catalogue import Catalogue, Ignored
from service.engine.events import Event
from service.engine.graph_counts import NO_GRAPHS, GraphCounts
from service.engine.job import Job, ModelKey

PREFIX = struct.Struct(">4sII")  # magic number; length of the text; length of all byte strings
MAGIC = b"LDM\x02"

# Exit codes of a worker.
FATAL_EXIT = 3  # the start failed, and would fail again
DEVICE_EXIT = 4  # the device fails at every call; it may work for another process
CAPTURE_EXIT = 5  # a CUDA graph could not be recorded, which would fail again


@dataclass(frozen=True)
class Submit:
    """Run a job."""

    job: Job


@dataclass(frozen=True)
class Cancel:
    """Stop a job, or a call about a model, that has no client any more."""

    job: str


@dataclass(frozen=True)
class Withdraw:
    """Give a job back that has not started: another replica can run it sooner."""

    job: str


@dataclass(frozen=True)
class Interrupt:
    """End a job that has started without further steps, with its images as they are."""

    job: str


@dataclass(frozen=True)
class SetLoaded:
    """Load a model, or unload it when no job uses it. A CallEnded with the same `call` follows."""

    call: str
    model: str
    load: bool


@dataclass(frozen=True)
class Offer:
    """What can be served of the catalogue with this number; replaces an earlier offer."""

    number: int
    specs: tuple[ModelSpec, ...]
    ignored: tuple[Ignored, ...]


@dataclass(frozen=True)
class Ready:
    """The worker takes jobs; sent once, after the first Offer.

    memory: bytes of the device; parts: seconds of each part of the start; holds: as in Heartbeat.
    """

    holds: tuple[ModelKey, ...]
    device: str
    memory: int
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Heartbeat:
    """Sent at regular intervals. ticks: of the engine so far; memory: bytes of the device in use; holds: the
    models, and models with LoRAs, that are loaded; graphs: its network calls so far."""

    ticks: int
    busy: bool
    loading: bool
    memory: int
    holds: tuple[ModelKey, ...] = ()
    graphs: GraphCounts = NO_GRAPHS


@dataclass(frozen=True)
class Fatal:
    """The worker cannot start, and another attempt would fail too; wrong_setting: because of a setting."""

    message: str
    wrong_setting: bool = False


@dataclass(frozen=True)
class Rejected:
    """The worker could not read a message. job: the job that the message was about, if that was readable."""

    job: str | None
    reason: str


Command = Submit | Cancel | Withdraw | Interrupt | Catalogue | SetLoaded  # to the worker; catalogue first
Report = Event | Offer | Ready | Heartbeat | Fatal | Rejected  # from the worker


class Frame(NamedTuple):
    """An encoded message without its prefix."""

    text: bytes
    body: bytes


class UnreadableMessageError(ValueError):
    """A frame is not a valid message. kind, job: those of the message, if they were readable."""

    def __init__(self, reason: str, kind: str | None = None, job: str | None = None) -> None:
        super().__init__(f"unreadable {kind or 'message'}: {reason}")
        self.kind = kind
        self.job = job


class LostSyncError(ConnectionError):
    """The stream does not continue with a frame, so nothing more can be read from it."""


def encode(message: Command | Report) -> bytes:
    """One message, ready to be sent."""
    blobs: list[bytes] = []
    kind: Any = type(message)
    values = _converter(kind).encode(message, blobs)
    sizes = [len(blob) for blob in blobs]
    text = json.dumps([kind.__name__, _job_of(message), values, sizes]).encode()
    body = b"".join(blobs)
    return PREFIX.pack(MAGIC, len(text), len(body)) + text + body


def decode_command(frame: Frame) -> Command:
    """The inverse of encode(). Raises UnreadableMessageError."""
    message: Command = _decode(frame, COMMANDS)
    return message


def decode_report(frame: Frame) -> Report:
    """The inverse of encode(). Raises UnreadableMessageError."""
    message: Report = _decode(frame, REPORTS)
    return message


def read_frame(stream: BinaryIO) -> Frame | None:
    """The next frame of a blocking stream; None at its end. Raises LostSyncError."""
    prefix = stream.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        return None
    text_size, body_size = _sizes(prefix)
    frame = Frame(stream.read(text_size), stream.read(body_size))
    return frame if len(frame.text) + len(frame.body) == text_size + body_size else None


async def receive_frame(reader: asyncio.StreamReader) -> Frame:
    """The next frame of a stream. Raises IncompleteReadError at its end, and LostSyncError."""
    text_size, body_size = _sizes(await reader.readexactly(PREFIX.size))
    return Frame(await reader.readexactly(text_size), await reader.readexactly(body_size))


def _sizes(prefix: bytes) -> tuple[int, int]:
    magic, text_size, body_size = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise LostSyncError(f"expected a message, not {prefix!r}")
    return text_size, body_size


def _job_of(message: Command | Report) -> str | None:
    """The id of the job that a message is about, if it is about one."""
    job = getattr(message, "job", None)
    return job.id if isinstance(job, Job) else job


def _decode(frame: Frame, kinds: dict[str, type]) -> Any:
    kind = job = None
    try:
        kind, job, values, sizes = json.loads(frame.text)
        return _converter(kinds[kind]).decode(values, list(_split(frame.body, sizes)))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        known = kind if isinstance(kind, str) else None
        about = job if isinstance(job, str) else None
        raise UnreadableMessageError(f"{type(error).__name__}: {error}", known, about) from error


def _split(body: bytes, sizes: list[int]) -> Iterator[bytes]:
    ends = list(accumulate(sizes))
    if ends[-1:] != [len(body)] and (ends or body):
        raise ValueError(f"byte strings of {sum(sizes)} bytes in a body of {len(body)}")
    return (body[end - size : end] for size, end in zip(sizes, ends, strict=True))


class Converter(NamedTuple):
    """How values of one annotation become JSON and back; byte strings go to, and come from, a list."""

    encode: Callable[[Any, list[bytes]], Any]
    decode: Callable[[Any, list[bytes]], Any]


@cache
def _converter(hint: Any) -> Converter:
    """The converter for an annotation. Raises TypeError for one that messages cannot hold."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is bytes:
        return Converter(_append, lambda value, blobs: blobs[_checked(value, int)])
    if hint in (bool, int, str, types.NoneType):
        return Converter(_unchanged, lambda value, blobs: _checked(value, hint))
    if hint is float:
        return Converter(_unchanged, lambda value, blobs: _checked(value, float, int))
    if origin is Literal:
        return Converter(_unchanged, lambda value, blobs: args[args.index(value)])
    if origin in (Union, types.UnionType):
        return _union(args)
    if origin is tuple and args[1:] == (...,):
        return _tuple(args[0])
    if origin is tuple:
        return _record(lambda *values: tuple(values), args)
    if isinstance(hint, type) and is_dataclass(hint):
        names = [field.name for field in fields(hint)]
        return _record(hint, _annotations(hint), lambda value: [getattr(value, name) for name in names])
    if isinstance(hint, type) and issubclass(hint, tuple):  # a NamedTuple
        return _record(hint, _annotations(hint))
    raise TypeError(f"messages cannot hold {hint}")


def _annotations(kind: type) -> tuple[Any, ...]:
    return tuple(get_type_hints(kind).values())


def _unchanged(value: Any, blobs: list[bytes]) -> Any:
    return value


def _append(value: bytes, blobs: list[bytes]) -> int:
    blobs.append(value)
    return len(blobs) - 1


def _checked(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError(f"expected {kinds[0].__name__}, not {value!r:.40}")
    return value


def _tuple(hint: Any) -> Converter:
    """Any number of values of one annotation."""
    item = _converter(hint)
    return Converter(
        lambda value, blobs: [item.encode(part, blobs) for part in value],
        lambda value, blobs: tuple(item.decode(part, blobs) for part in _checked(value, list)),
    )


def _record(
    make: Callable[..., Any], hints: tuple[Any, ...], split: Callable[[Any], Any] = lambda value: value
) -> Converter:
    """A fixed number of values, each with its own annotation. split: the inverse of make."""
    items = tuple(map(_converter, hints))

    def encode(value: Any, blobs: list[bytes]) -> list[Any]:
        return [item.encode(part, blobs) for item, part in zip(items, split(value), strict=True)]

    def decode(value: Any, blobs: list[bytes]) -> Any:
        parts = zip(items, _checked(value, list), strict=True)
        return make(*[item.decode(part, blobs) for item, part in parts])

    return Converter(encode, decode)


def _union(hints: tuple[Any, ...]) -> Converter:
    """One of several annotations: a value with the number of its class among them, and None as null."""
    classes = [hint for hint in hints if hint is not types.NoneType]
    items = tuple(map(_converter, classes))

    def encode(value: Any, blobs: list[bytes]) -> Any:
        if value is None:
            return None
        number = 0 if len(items) == 1 else classes.index(type(value))
        return [number, items[number].encode(value, blobs)]

    def decode(value: Any, blobs: list[bytes]) -> Any:
        if value is None and len(classes) < len(hints):
            return None
        number, inner = _checked(value, list)
        return items[_checked(number, int)].decode(inner, blobs)

    return Converter(encode, decode)


COMMANDS: dict[str, type] = {kind.__name__: kind for kind in get_args(Command)}
REPORTS: dict[str, type] = {kind.__name__: kind for kind in get_args(Report)}

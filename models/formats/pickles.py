"""Finds the tensors in torch's pickled checkpoints, without torch and without unpickling.

A checkpoint is a zip file of uncompressed entries: a pickle that describes the tensors, which pickle_machine
reads as data, and one entry for each storage of numbers.
"""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from models.errors import CheckpointError
from models.formats.config_files import shortened
from models.formats.pickle_machine import HarmfulNameError, Storage, TensorRecord, run, run_next
from models.formats.safetensors import ITEM_SIZES, ZIP, Header, Stored, opened, sniff

MAX_PICKLE_BYTES = 2**24
MAX_DIRECTORY_BYTES = 2**21  # of the zip file's list of entries; a model of 2,500 tensors takes 200,000
OLD_FORMAT = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch before 1.6
OLD_VERSION = 1001
IP_ADAPTER_PARTS = ("image_proj", "ip_adapter")  # state dicts in the dictionary of an IP-Adapter
BOOKKEEPING = (int, float, str, bytes, list, tuple, dict, type(None))  # values that are no tensors
Ranges = dict[str, tuple[int, int]]  # name of an entry -> position of its first byte, and length
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of an entry in a zip file
# The record that ends a zip file's directory, in both forms: signature, where the directory's size is in it
# and in which format, the record's length.
DIRECTORY_ENDS = ((b"PK\x05\x06", 12, "<L", 22), (b"PK\x06\x06", 40, "<Q", 56))
ENCRYPTED = 1  # bit of an entry's flags
MAX_SHARING = 4  # total size of all tensors, in units of the file's size; a few may share their storage


def read_pickle(file: Path) -> Header:
    """The tensors of a checkpoint that torch.save wrote, at the top level or below `state_dict`.

    Reads only the pickle and the list of entries; no code in them runs. Raises CheckpointError.
    """
    with opened(file) as (stream, size):
        head = sniff(file, stream, size)
        check_format(file, head)
        try:
            if head.startswith(OLD_FORMAT):
                records, ranges = read_old_format(file, stream, size)
            else:
                records, ranges = read_archive(file, stream, size)
        except HarmfulNameError as error:
            raise CheckpointError(
                f"{file} is refused: it contains more than tensors, it names {error}"
            ) from error
        except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, IndexError) as error:
            raise ValueError(str(error) or "it ends too early") from error
        tensors = {name: stored_tensor(name, record, ranges) for name, record in records.items()}
        if (total := sum(entry.bytes for entry in tensors.values())) > MAX_SHARING * size:
            raise ValueError(f"its tensors would take {total} bytes, the file has {size}")
        return Header(tensors)


def read_archive(file: Path, stream: BinaryIO, size: int) -> tuple[dict[str, TensorRecord], Ranges]:
    """The tensors of a zip file, and where its entries lie."""
    check_directory(stream, size)
    with zipfile.ZipFile(stream) as archive:
        entries = read_entries(archive)
        records = named_tensors(file, run(read_entry(archive, entries["data.pkl"], MAX_PICKLE_BYTES)))
        return records, {key: data_range(stream, entry, size) for key, entry in entries.items()}


def check_format(file: Path, head: bytes) -> None:
    """Raise CheckpointError, naming the format, for a file that is not one of torch."""
    if head.startswith((ZIP, OLD_FORMAT)):
        return
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{file} is a tar archive, not a checkpoint of torch")
    if head[8:9] == b"{":
        raise CheckpointError(f"{file} is a safetensors file; rename it to end in .safetensors")
    raise CheckpointError(f"{file} is not a checkpoint of torch: it is not a zip file")


def check_directory(stream: BinaryIO, size: int) -> None:
    """Raise ValueError for a list of entries that would take much time and memory, in either of its forms."""
    stream.seek(max(0, size - 2**16 - 128))
    tail = stream.read()
    for signature, offset, form, length in DIRECTORY_ENDS:
        at = tail.find(signature)
        while at >= 0:
            if at + length <= len(tail):
                claimed = struct.unpack_from(form, tail, at + offset)[0]
                if claimed > MAX_DIRECTORY_BYTES and claimed != 2**32 - 1:
                    raise ValueError(f"its list of entries would have {claimed} bytes")
            at = tail.find(signature, at + 1)


def read_entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Name below the archive's one folder -> entry. Raises ValueError for what torch does not write."""
    infos = archive.infolist()
    roots = {info.filename.partition("/")[0] for info in infos}
    if len(roots) != 1:
        raise ValueError("its entries are not in one folder, as torch writes them")
    entries = {info.filename.partition("/")[2]: info for info in infos}
    if len(entries) != len(infos):
        raise ValueError("two of its entries have the same name")
    if "data.pkl" not in entries:
        raise ValueError("it has no data.pkl: it is not a checkpoint of torch")
    for name, info in entries.items():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its entry {shortened(name)} is compressed, which torch's never are")
        if info.flag_bits & ENCRYPTED:
            raise ValueError(f"its entry {shortened(name)} is encrypted, which torch's never are")
    if "byteorder" in entries and read_entry(archive, entries["byteorder"], 16) != b"little":
        raise ValueError("its numbers are not little-endian")
    return entries


def read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int) -> bytes:
    """An entry's bytes, whose checksum zipfile verifies. Raises ValueError if there are too many."""
    if info.file_size > max_bytes:
        raise ValueError(
            f"its entry {shortened(info.filename)} has {info.file_size} bytes, more than {max_bytes}"
        )
    return archive.read(info)


def data_range(stream: BinaryIO, entry: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Position of the first byte and length of an entry's data in the file."""
    stream.seek(entry.header_offset)
    signature, *_, name, extra = LOCAL_HEADER.unpack(stream.read(LOCAL_HEADER.size))
    start = entry.header_offset + LOCAL_HEADER.size + name + extra
    if signature != ZIP or start + entry.file_size > size:
        raise ValueError(f"its entry {shortened(entry.filename)} lies outside of the file")
    return start, entry.file_size


def named_tensors(file: Path, value: Any) -> dict[str, TensorRecord]:
    """The state dict in the value of a pickle, without the numbers, texts and containers in it."""
    for inner in ("state_dict", "string_to_param"):  # string_to_param: of textual inversions
        if isinstance(value, dict) and isinstance(value.get(inner), dict):
            value = value[inner]
    if isinstance(value, dict) and all(isinstance(value.get(part), dict) for part in IP_ADAPTER_PARTS):
        parts = {part: value[part] for part in IP_ADAPTER_PARTS}
        value = {f"{part}.{key}": record for part, inner in parts.items() for key, record in inner.items()}
    items = value.items() if isinstance(value, dict) else ()
    records = {key: record for key, record in items if not isinstance(record, BOOKKEEPING)}
    for key, record in records.items():
        if not isinstance(key, str) or not isinstance(record, TensorRecord):
            name = shortened(key) if isinstance(key, str) else type(key).__name__
            raise CheckpointError(f"{file} contains something other than named tensors: {name}")
    if not records:
        raise CheckpointError(f"{file} contains something other than named tensors")
    return records


def read_old_format(file: Path, stream: BinaryIO, size: int) -> tuple[dict[str, TensorRecord], Ranges]:
    """The tensors of a file of torch before 1.6, and where its storages lie.

    The file is five pickles (mark, version, machine, value, keys of the storages), then each storage: its
    number of values, and the values.
    """
    stream.seek(0)
    pickles, storages = io.BytesIO(stream.read(MAX_PICKLE_BYTES)), dict[str, Storage]()
    _, version, system, value, keys = (run_next(pickles, storages) for _ in range(5))
    if version != OLD_VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its version is unknown, or its numbers are not little-endian")
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise ValueError("its list of storages is damaged")
    ranges, position = {}, pickles.tell()
    for key in keys:
        stream.seek(position)
        (count,) = struct.unpack("<Q", stream.read(8))
        start, length = position + 8, storages[key].count * ITEM_SIZES[storages[key].dtype]
        if count != storages[key].count or start + length > size:
            raise ValueError(f"its storage {shortened(key)} has {count} numbers")
        ranges[f"data/{key}"] = (start, length)
        position = start + length
    return named_tensors(file, value), ranges


def stored_tensor(name: str, record: TensorRecord, ranges: dict[str, tuple[int, int]]) -> Stored:
    """Where a tensor lies. Raises ValueError if its storage does not contain it."""
    storage, shape, stride = record.storage, record.shape, record.stride
    if f"data/{storage.key}" not in ranges:
        raise ValueError(f"the numbers of {shortened(name)} are missing")
    start, length = ranges[f"data/{storage.key}"]
    width = ITEM_SIZES[storage.dtype]
    if storage.count * width != length:
        raise ValueError(
            f"{shortened(name)} has {storage.count} numbers of {storage.dtype} in {length} bytes"
        )
    count, reach = 1, 1  # how many numbers, and the distance from the first to the last
    for side, step in zip(shape, stride, strict=True):
        count, reach = count * side, reach + (side - 1) * step
    reach = reach if count else 0
    if record.offset + reach > storage.count or count > storage.count:
        raise ValueError(f"{shortened(name)} of shape {shape} exceeds its {storage.count} numbers")
    return Stored(storage.dtype, shape, stride, start + record.offset * width, reach * width)

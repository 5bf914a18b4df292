"""Opens files of tensors; a tensor is read when it is needed."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.errors import CheckpointError
from models.formats.config_files import read_json, reason, shortened
from models.formats.safetensors import Header, Stored, is_safetensors
from models.formats.single_file import read_header

INDEX_SUFFIX = ".index.json"
VARIANTS = ("", ".fp16")
OTHER_VARIANTS = (".bf16", ".fp32", ".ema", ".non_ema")  # used if there is none of these
MAX_LISTED_KEYS = 4  # in an error message
MAX_KEY_CHARS = 200  # of each of them


class FileNames(NamedTuple):
    """Names of a network's files without suffixes: as safetensors, and pickled."""

    safe: str
    pickled: str

    @property
    def safe_file(self) -> str:
        """The file of a network that is written as one."""
        return f"{self.safe}.safetensors"


NETWORK_FILES = FileNames("diffusion_pytorch_model", "diffusion_pytorch_model")
TEXT_FILES = FileNames("model", "pytorch_model")


def nothing() -> None:
    pass


class Weights(NamedTuple):
    """Tensors in one or more files.

    read: name -> tensor on the device, in the file's dtype. release: give back the memory that reading took,
    except that of tensors in use; they must not have been changed.
    """

    stored: Mapping[str, Stored]
    read: Callable[[str], Tensor]
    release: Callable[[], None] = nothing

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: stored.shape for key, stored in self.stored.items()}

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Some or all of the tensors under other names; names: new -> old."""
        stored = {new: self.stored[old] for new, old in names.items()}
        return Weights(stored, lambda new: self.read(names[new]), self.release)

    def selected(self, keys: Iterator[str] | set[str] | list[str]) -> Weights:
        """Some of the tensors, under their names."""
        return self.renamed({key: key for key in keys})


def open_weights(file: Path, device: torch.device | str, allow_pickle: bool) -> Weights:
    """The tensors of one file. Raises CheckpointError, also for a pickled one if these are not allowed."""
    return map_weights(file, read_header(file, allow_pickle), device)


def map_weights(file: Path, header: Header, device: torch.device | str) -> Weights:
    """The tensors of a file whose header was read. The file is mapped into memory.

    On the device "meta" tensors have shapes and no values, and nothing more of the file is read.
    """
    if torch.device(device).type == "meta":
        return Weights(header.tensors, lambda name: shape_of(header.tensors[name]))
    with translated(file), file.open("rb") as stream:
        # Copy on write: changes of a tensor do not reach the file.
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def read(name: str) -> Tensor:
        with translated(file):  # the file may have been cut off since its header was read
            return tensor_in(data, header.tensors[name]).to(device)

    return Weights(header.tensors, read, partial(forget_pages, data))


def forget_pages(data: mmap.mmap) -> None:
    """Take the pages of a mapped file out of this process's memory; they are mapped again where needed."""
    if hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)


@contextmanager
def translated(file: Path) -> Iterator[None]:
    """Errors of reading a file become a CheckpointError."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is corrupt or truncated: {reason(error)}") from error


def shape_of(stored: Stored) -> Tensor:
    """A tensor without values."""
    return torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device="meta")


def tensor_in(data: mmap.mmap, stored: Stored) -> Tensor:
    """A view of a mapped file; a copy if the tensor has gaps or is not aligned to its numbers."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    if not stored.extent:
        return torch.empty(stored.shape, dtype=dtype)
    buffer: mmap.mmap | bytearray = data
    start = stored.start
    if start % dtype.itemsize:
        buffer, start = bytearray(data[start : start + stored.extent]), 0
    flat = torch.frombuffer(buffer, dtype=dtype, count=stored.extent // dtype.itemsize, offset=start)
    return flat.as_strided(stored.shape, stored.stride).contiguous()


def open_network(folder: Path, names: FileNames, device: torch.device | str, allow_pickle: bool) -> Weights:
    """The tensors of a network in a folder: in one file, or in several with an index; pickled ones last."""
    file, index = find_network(folder, names)
    if is_safetensors(file) or allow_pickle:
        return (
            open_shards(index, file.suffix, device, allow_pickle)
            if index
            else open_weights(file, device, allow_pickle)
        )
    raise CheckpointError(
        f"{folder} has pickled weights only ({(index or file).name}); these need allow_pickle"
    )


def find_network(folder: Path, names: FileNames) -> tuple[Path, Path | None]:
    """The file of a network, and its index if there are several. Raises CheckpointError if there is none."""
    stems = (names.safe, ".safetensors"), (names.pickled, ".bin")
    for variants in (VARIANTS, OTHER_VARIANTS):
        for (stem, suffix), variant in product(stems, variants):
            file = folder / f"{stem}{variant}{suffix}"
            # Older files have the variant at the end.
            indexes = [
                folder / f"{stem}{suffix}.index{variant}.json",
                file.with_name(file.name + INDEX_SUFFIX),
            ]
            index = next((index for index in indexes if index.is_file()), None)
            if file.is_file() or index:
                return file, None if file.is_file() else index
    raise CheckpointError(f"{folder / names.safe_file} is missing")


def other_variant(folder: Path, names: FileNames) -> str | None:
    """A sentence about the file of a network, if it is another one than usual."""
    file, index = find_network(folder, names)
    found = [variant for variant in OTHER_VARIANTS if f"{variant}." in (index or file).name]
    return f"{folder.name}/{(index or file).name} is used: there is no other variant" if found else None


def open_shards(index: Path, suffix: str, device: torch.device | str, allow_pickle: bool) -> Weights:
    """The tensors of a network in several files, next to an index that says which tensor is in which file."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{index}: weight_map must be an object that names {suffix} files")
    for name in files.values():
        # A name with a folder in it could lead anywhere.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(
                f"{index}: weight_map must name {suffix} files in its folder, not {shortened(name)}"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing; {index.name} names it")
    names = sorted(set(files.values()))
    shards = {name: open_weights(index.parent / name, device, allow_pickle) for name in names}
    location: dict[str, str] = {}
    for name, shard in shards.items():
        if twice := sorted(location.keys() & shard.stored.keys()):
            raise CheckpointError(f"{index}: its files have {summarise_keys('duplicate', twice)}")
        location.update((key, name) for key in shard.stored)
    if location != files:
        wrong = [key for key in {**files, **location} if location.get(key) != files.get(key)]
        raise CheckpointError(f"{index} does not match its files: {summarise_keys('different', wrong)}")
    stored = {key: shards[name].stored[key] for key, name in location.items()}

    def release() -> None:
        for shard in shards.values():
            shard.release()

    return Weights(stored, lambda key: shards[location[key]].read(key), release)


def summarise_keys(problem: str, keys: list[str]) -> str:
    """How many keys have a problem, and the first of them by name."""
    more = f" and {len(keys) - MAX_LISTED_KEYS} more" if len(keys) > MAX_LISTED_KEYS else ""
    listed = ", ".join(key[:MAX_KEY_CHARS] for key in sorted(keys)[:MAX_LISTED_KEYS])
    return f"{len(keys)} {problem} keys: {listed}{more}"

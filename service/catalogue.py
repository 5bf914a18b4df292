"""The files in the folders of --model-dir and --lora-dir, by kind and name. Opens none of them; no torch.

A folder that is laid out as the `models` folder of AUTOMATIC1111 or ComfyUI (it has a subfolder of FOLDERS)
has files of the kinds that the names of its subfolders say. Any other folder is searched for models, with all
its subfolders. Links are followed; hidden files and unfinished downloads are left out. Names in requests are
only looked up in the catalogue: they never become a path.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

from models.formats.identify import is_checkpoint
from models.formats.safetensors import is_safetensors
from service.model_paths import (
    locate_all,
    locate_controls,
    locate_embeddings,
    locate_loras,
    locate_references,
)
from service.settings import Settings

Kind = Literal[
    "model", "lora", "embedding", "vae", "tiny_vae", "control", "reference_adapter", "image_encoder"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Name of a folder in lower case -> kind of the files in it.
FOLDERS: Mapping[str, Kind] = {
    **dict.fromkeys(("stable-diffusion", "checkpoints", "diffusers"), "model"),
    **dict.fromkeys(("lora", "loras", "lycoris"), "lora"),
    **dict.fromkeys(("embeddings", "textual_inversion"), "embedding"),
    "vae": "vae",
    **dict.fromkeys(("vae-approx", "vae_approx"), "tiny_vae"),
    **dict.fromkeys(("controlnet", "t2i_adapter"), "control"),
    **dict.fromkeys(("ipadapter", "ip-adapter"), "reference_adapter"),
    "clip_vision": "image_encoder",
}
# Subfolders that are laid out like their parent: A1111's folder has `models` and `embeddings`.
ROOTS = ("models",)
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
UNFINISHED = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".download", ".aria2", ".incomplete")
UNSUPPORTED = {
    ".gguf": "GGUF files are not supported",
    ".onnx": "ONNX files are not supported",
    ".sft": "rename it to .safetensors",
}
# Stems that say nothing: the name is that of the folder.
GENERIC_STEMS = ("model", "adapter_model", "pytorch_lora_weights", "diffusion_pytorch_model")
SEPARATE_VAE = ".vae"  # A1111: the end of the stem of a VAE beside its model
PART_CONFIG = "config.json"  # in a folder with one network
MAX_DEPTH = 16  # of subfolders
MAX_FILES = 100_000  # looked at, in all folders together


class Entry(NamedTuple):
    """A file or folder that requests can name.

    file: its path below the folder that was given, for messages. version: changes with the file, and with the
    files of the same stem beside it.
    """

    kind: Kind
    name: str
    path: str
    file: str
    version: str


class Ignored(NamedTuple):
    """A file that is not used. file: as in Entry, or a name given at start-up."""

    file: str
    reason: str


def ignored(entry: Entry, reason: str) -> Ignored:
    """An entry that cannot be used. The reason loses its path."""
    path = Path(entry.path)
    return Ignored(entry.file, reason.replace(str(path), path.name).replace(f"{path.parent}{os.sep}", ""))


@dataclass(frozen=True)
class Catalogue:
    """What the folders contained when they were read. number: counts how often they were."""

    number: int = 0
    entries: tuple[Entry, ...] = ()
    ignored: tuple[Ignored, ...] = ()

    def of(self, *kinds: Kind) -> Iterator[Entry]:
        """The entries of some kinds."""
        return (entry for entry in self.entries if entry.kind in kinds)

    def separate_vaes(self, given: Mapping[str, Path] = MappingProxyType({})) -> dict[str, Entry]:
        """Model -> the VAE beside it, NAME.vae. given: models that were given at start-up."""
        vaes = {Path(entry.path).with_suffix(""): entry for entry in self.of("vae")}
        models = dict(given) | {entry.name: Path(entry.path) for entry in self.of("model")}
        stems = ((name, path.with_suffix(SEPARATE_VAE)) for name, path in models.items())
        return {name: vaes[stem] for name, stem in stems if stem in vaes}


class Folders:
    """The folders in the settings, and the models given by path (name -> path).

    Raises ModelPathError for a model or an adapter that is not there.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        folders = read_catalogue(settings.model_dir, (), settings.allow_pickle)
        found = {entry.name: Path(entry.path) for entry in folders.of("model")}
        self.models = locate_all(settings.model, settings.allow_pickle, found)
        self.taken: dict[Kind, Mapping[str, Path]] = {
            "model": self.models,
            "lora": locate_loras(settings.lora),
            "embedding": locate_embeddings(settings.embedding),
            "control": locate_controls(settings.controlnet),
            "reference_adapter": locate_references(settings.reference_adapter),
        }

    def read(self, number: int = 0) -> Catalogue:
        """What is in the folders now. number: of the catalogue."""
        settings = self.settings
        folders = settings.model_dir, settings.lora_dir
        return read_catalogue(*folders, settings.allow_pickle, self.taken, number)


def read_catalogue(
    model_dirs: Iterable[str],
    lora_dirs: Iterable[str],
    allow_pickle: bool = False,
    taken: Mapping[Kind, Mapping[str, Path]] = MappingProxyType({}),
    number: int = 0,
) -> Catalogue:
    """The catalogue of these folders. taken: files given at start-up, whose names no other file gets.

    Of files of one kind with the same name, the first is used: in the order of the folders, then by path,
    files before those in subfolders. A folder that cannot be read is ignored like a file that cannot.
    """
    walk = Walk(allow_pickle)
    for text in model_dirs:
        folder = Path(os.path.abspath(text))
        walk.read_root(folder, folder, FOLDERS.get(folder.name.lower()))
    for text in lora_dirs:
        folder = Path(os.path.abspath(text))
        walk.read(folder, folder, "lora")
    entries, ignored = without_duplicates(walk.entries, taken)
    return Catalogue(number, tuple(entries), (*walk.ignored, *ignored))


def without_duplicates(
    entries: Iterable[Entry], taken: Mapping[Kind, Mapping[str, Path]]
) -> tuple[list[Entry], list[Ignored]]:
    """The first entry of each kind and name, and the others. Words of prompts have no case."""
    first: dict[tuple[Kind, str], Entry] = {}
    ignored = []
    given = {(kind, key_of(kind, name)): str(path) for kind in taken for name, path in taken[kind].items()}
    for entry in entries:
        key = entry.kind, key_of(entry.kind, entry.name)
        if given.get(key) == entry.path:
            continue
        if key in given:
            ignored.append(Ignored(entry.file, f"the name {entry.name} was given at start-up"))
        elif first.setdefault(key, entry).path != entry.path:
            ignored.append(Ignored(entry.file, f"{first[key].file} has the same name"))
    return list(first.values()), ignored


def key_of(kind: Kind, name: str) -> str:
    return name.lower() if kind == "embedding" else name


class Walk:
    """Reads folders; collects entries and ignored files, in the order in which their names are given."""

    def __init__(self, allow_pickle: bool) -> None:
        self.allow_pickle = allow_pickle
        self.entries: list[Entry] = []
        self.ignored: list[Ignored] = []
        self.seen: set[tuple[Kind, int, int]] = set()  # folders, so that a loop of links ends
        self.files = 0

    def read_root(self, folder: Path, root: Path, kind: Kind | None) -> None:
        """Read a folder that was given; kind: the one that its own name says."""
        subfolders = [Path(item.path) for item in self.listed(folder, root) if item.is_dir()]
        named = [sub for sub in subfolders if sub.name.lower() in FOLDERS or sub.name in ROOTS]
        if kind or not named:
            return self.read(folder, root, kind or "model")
        self.read(folder, root, "model", depth=MAX_DEPTH)  # only the files and diffusers folders in it
        for sub in named:
            if sub.name in ROOTS:
                self.read_root(sub, root, None)
            else:
                self.read(sub, root, FOLDERS[sub.name.lower()])
        return None

    def read(self, folder: Path, root: Path, kind: Kind, depth: int = 0) -> None:
        """Read the files of one kind in a folder and its subfolders."""
        if self.was_read(folder, kind):
            return
        items = self.listed(folder, root)
        names = {item.name for item in items}
        subfolders = []
        for item in items:
            path = Path(item.path)
            if item.is_dir():
                if is_entry(path, kind):
                    self.add(Entry(kind, path.name, item.path, below(path, root), version_of(path)))
                elif not (path / PART_CONFIG).is_file():
                    subfolders.append(path)
            elif item.is_file():
                self.read_file(path, root, kind, names)
        if depth < MAX_DEPTH:
            for path in subfolders:
                self.read(path, root, kind, depth + 1)

    def read_file(self, path: Path, root: Path, kind: Kind, names: Collection[str]) -> None:
        """Add a file, or say why it is ignored; files that belong to another one are passed over."""
        suffix = path.suffix.lower()
        reason = None
        if suffix in UNFINISHED or any(path.name + end in names for end in UNFINISHED):
            reason = "it is still being downloaded"
        elif suffix in UNSUPPORTED:
            reason = UNSUPPORTED[suffix]
        elif is_safetensors(path) or suffix in PICKLES:
            if not is_safetensors(path) and not self.allow_pickle:
                reason = "pickled weights need --allow-pickle"
            elif not path.stem.isprintable():
                reason = "its name has characters that cannot be printed"
        elif is_companion(path, names):
            return
        else:
            reason = "it is not a file of weights"
        if reason:
            self.ignored.append(Ignored(below(path, root), reason))
            return
        name = path.parent.name if path.stem in GENERIC_STEMS and path.parent != root else path.stem
        kind = "vae" if kind == "model" and path.stem.endswith(SEPARATE_VAE) else kind
        self.add(Entry(kind, name, str(path), below(path, root), version_of(path)))

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)

    def listed(self, folder: Path, root: Path) -> list[os.DirEntry[str]]:
        """What is in a folder, without hidden files, by name."""
        try:
            with os.scandir(folder) as found:
                items = sorted((item for item in found if not item.name.startswith(".")), key=by_name)
        except OSError as error:
            self.ignored.append(Ignored(below(folder, root), f"it cannot be read: {error.strerror}"))
            return []
        room = MAX_FILES - self.files
        self.files += len(items)
        if len(items) > room:
            reason = f"the folders have more than {MAX_FILES} files; the others are ignored"
            self.ignored.append(Ignored(below(folder, root), reason))
        return items[: max(room, 0)]

    def was_read(self, folder: Path, kind: Kind) -> bool:
        """Whether a folder was read for this kind, perhaps by another path."""
        try:
            state = folder.stat()
        except OSError:
            return False  # listed() says why
        key = kind, state.st_dev, state.st_ino
        found = key in self.seen
        self.seen.add(key)
        return found


def by_name(item: os.DirEntry[str]) -> str:
    return item.name


def below(path: Path, root: Path) -> str:
    """A path for messages: below the folder that was given, and with that folder's name alone."""
    return str(Path(root.name, path.relative_to(root)))


def is_entry(folder: Path, kind: Kind) -> bool:
    """Whether a folder as a whole is a model, or another network of its kind in the layout of diffusers."""
    if kind == "model":
        return is_checkpoint(folder)
    return kind != "lora" and (folder / PART_CONFIG).is_file()


def is_companion(path: Path, names: Collection[str]) -> bool:
    """Whether a file belongs to a file of weights, whose stem it has (previews, descriptions, YAML files), or
    is an empty file that marks where files belong."""
    weights = (".safetensors", *PICKLES)
    stems = [path.name[: -len(path.suffix)] if path.suffix else path.name]
    stems.append(Path(stems[0]).stem)  # NAME.preview.png, NAME.civitai.info
    return any(stem + suffix in names for stem in stems for suffix in weights) or is_empty(path)


def is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:
        return False


def version_of(path: Path) -> str:
    """A digest that changes when a file, its YAML file, or a file in a folder is replaced or written."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = [path, path.with_suffix(".yaml"), path.with_suffix(".yml")]
    digest = hashlib.sha256()
    for file in files:
        try:
            state = file.stat()
        except OSError:
            continue
        state_text = f"{state.st_ino} {state.st_size} {state.st_mtime_ns}"
        digest.update(f"{file} {state_text}\n".encode(errors="replace"))
    return digest.hexdigest()[:32]

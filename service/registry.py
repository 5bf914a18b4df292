"""Names of models -> where they are -> what they are; which are loaded. Knows no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Generic, TypeVar

from models import singles, words
from models.configs import read_spec
from models.errors import CheckpointError
from models.spec import ModelSpec

BOXED = ("emoji", "emoji-upscale")  # the models that come with the package

Bundle = TypeVar("Bundle")


class ModelPathError(ValueError):
    """A model named at start-up that is not there."""


def locate(name: str, allow_pickle: bool = False) -> tuple[str, Path]:
    """Name and place of a model named at start-up: one in the box, a folder, or a single file.

    A folder is called as it is named, a file by its stem. Raises ModelPathError, also for a pickled file that
    is not allowed. Never for names in requests: those are looked up in what was loaded.
    """
    path = boxed(name) if name in BOXED else Path(name)
    if path is not None and path.is_file():
        if path.suffix != ".safetensors" and not allow_pickle:
            raise ModelPathError(f"{name!r} is not a .safetensors file; pickled weights need --allow-pickle")
        return singles.name_of(path), path.resolve()
    if path is None or not ((path / "model_index.json").is_file() or singles.weights_of(path)):
        ours = " or ".join(map(repr, BOXED))
        raise ModelPathError(
            f"no model at {name!r}: expected {ours}, a folder with a model_index.json, "
            "a .safetensors file or a .ckpt file"
        )
    return path.resolve().name, path.resolve()


def boxed(name: str) -> Path | None:
    """The folder of a model in the box; None where the package came without."""
    try:
        return Path(str(resources.files("weights") / name))
    except ModuleNotFoundError:
        return None


def locate_all(names: tuple[str, ...], allow_pickle: bool = False) -> dict[str, Path]:
    """locate() for each; raises ModelPathError also for two of the same name."""
    found: dict[str, Path] = {}
    for name, path in (locate(name, allow_pickle) for name in names):
        if found.setdefault(name, path) != path:
            raise ModelPathError(f"two models are called {name!r}; rename one of them")
    return found


def read_specs(paths: Mapping[str, Path], allow_pickle: bool = False) -> dict[str, ModelSpec]:
    """What the models are, each called as here. Raises CheckpointError, also for one that makes nothing."""
    specs = {name: replace(read_spec(path, allow_pickle), name=name) for name, path in paths.items()}
    for name, spec in specs.items():
        if spec.unet is None:
            raise CheckpointError(f"{name} is a first stage alone, E and D: there is nothing to generate")
        if spec.lacks_context:
            raise CheckpointError(f"{name}: {words.TEXT_WANTED}")
    return specs


class Registry(Generic[Bundle]):
    """Models by name: what they are, always; their bundles, as many as the memory allows.

    load: place -> bundle; size: spec -> bytes of its weights; memory: bytes for all weights together, 0 for
    no limit. Of what must go, the least recently used goes first. Raises CheckpointError for a model
    that cannot be read.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        load: Callable[[Path], Bundle],
        size: Callable[[ModelSpec], int] = lambda spec: 0,
        memory: int = 0,
        allow_pickle: bool = False,
    ) -> None:
        self.specs = read_specs(paths, allow_pickle)
        self._paths = dict(paths)
        self._load = load
        self._sizes = {name: size(spec) for name, spec in self.specs.items()} if memory else {}
        self._memory = memory
        self._loaded: OrderedDict[str, Bundle] = OrderedDict()  # the least recently used first
        self.loading = False  # right now, in another thread than the one that asks

    def __iter__(self):
        return iter(self._paths)

    def __getitem__(self, name: str) -> Bundle:
        """The bundle, loaded now if it is not. Raises KeyError for a name not given at start-up."""
        if name not in self._loaded:
            self.load(name, self._loaded.keys())
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def holds(self, name: str) -> bool:
        return name in self._loaded

    def load(self, name: str, busy: Collection[str] = ()) -> bool:
        """Load a model, in the place of others that are not busy; False if it does not fit beside the busy.

        Beside nothing it is loaded whatever its size.
        """
        if self._taken(busy) + self._sizes.get(name, 0) > self._memory > 0 and self._holds_any(busy):
            return False
        for other in [other for other in self._loaded if other not in busy]:
            if self._taken(self._loaded) + self._sizes.get(name, 0) <= self._memory or not self._memory:
                break
            del self._loaded[other]
        self.loading = True
        try:
            self._loaded[name] = self._load(self._paths[name])
        finally:
            self.loading = False
        return True

    def load_all(self) -> None:
        """Load the first model, and those after it that fit beside what is loaded."""
        for name in self._paths:
            self.load(name, tuple(self._loaded))

    def _taken(self, names: Iterable[str]) -> int:
        """Bytes of those of these models that are loaded."""
        return sum(self._sizes.get(name, 0) for name in names if name in self._loaded)

    def _holds_any(self, names: Iterable[str]) -> bool:
        return any(name in self._loaded for name in names)


def first_of(specs: Mapping[str, ModelSpec]) -> str:
    """The model of a request that names none: the first given at start-up."""
    return next(iter(specs))

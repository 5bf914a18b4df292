"""Names of models -> where they are -> what they are, loaded once. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Generic, TypeVar

from models.spec import ModelSpec

BOXED = "emoji"  # the model that comes with the package

Bundle = TypeVar("Bundle")


class ModelPathError(ValueError):
    """A model named at start-up that is not there."""


def locate(name: str) -> tuple[str, Path]:
    """Name and folder of a model named at start-up: the model in the box, or a folder, named as it is.

    Raises ModelPathError. Never for names in requests: those are looked up in what was loaded.
    """
    path = boxed() if name == BOXED else Path(name)
    if path is None or not (path / "model_index.json").is_file():
        raise ModelPathError(f"no model at {name!r}: expected {BOXED!r} or a folder with a model_index.json")
    return path.resolve().name, path.resolve()


def boxed() -> Path | None:
    """The folder of the model in the box; None where the package came without."""
    try:
        return Path(str(resources.files("weights") / BOXED))
    except ModuleNotFoundError:
        return None


def locate_all(names: tuple[str, ...]) -> dict[str, Path]:
    """locate() for each; raises ModelPathError also for two of the same name."""
    found: dict[str, Path] = {}
    for name, path in map(locate, names):
        if found.setdefault(name, path) != path:
            raise ModelPathError(f"two models are called {name!r}; rename one of the folders")
    return found


class Registry(Generic[Bundle]):
    """Bundles by name, each loaded when first asked for and then kept."""

    def __init__(self, paths: Mapping[str, Path], load: Callable[[Path], Bundle]) -> None:
        self._paths = dict(paths)
        self._load = load
        self._loaded: dict[str, Bundle] = {}

    def __iter__(self):
        return iter(self._paths)

    def __getitem__(self, name: str) -> Bundle:
        """The bundle; raises KeyError for a name that was not given at start-up."""
        if name not in self._loaded:
            self._loaded[name] = self._load(self._paths[name])
        return self._loaded[name]


def first_of(specs: Mapping[str, ModelSpec]) -> str:
    """The model of a request that names none: the first given at start-up."""
    return next(iter(specs))

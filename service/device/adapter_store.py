"""The weights of controls and reference adapters: loaded when a job first needs them. Imports no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from service.engine.job import AdapterKey, WeightsKey


class AdapterFile(NamedTuple):
    """What is known of an adapter's file before it is loaded.

    version: changes with the file; size: bytes of the weights; of_model: it is loaded for each model
    separately, as changes of its weights. encoder: path of an image encoder, of encoder_size bytes, which
    adapters share; "" for none.
    """

    path: str = ""
    version: str = ""
    size: int = 0
    of_model: bool = False
    encoder: str = ""
    encoder_size: int = 0


class LoadedAdapter(NamedTuple):
    """An adapter, and the file from which it was loaded."""

    adapter: Any
    file: AdapterFile


def open_nothing(key: AdapterKey, file: AdapterFile, model: Any) -> Any:
    raise LookupError(f"no adapter {key.name} can be loaded")


class AdapterStore:
    """Loaded adapters, least recently used first.

    open_: loads an adapter from its file for a loaded model. Models share an adapter unless its file holds
    changes of a model's weights.
    """

    def __init__(self, open_: Callable[[AdapterKey, AdapterFile, Any], Any] = open_nothing) -> None:
        self._open = open_
        self._files: dict[tuple[str, str], AdapterFile] = {}  # of all adapters that were ever offered
        self._loaded: OrderedDict[AdapterKey, LoadedAdapter] = OrderedDict()

    def install(self, files: Mapping[tuple[str, str], AdapterFile]) -> None:
        """Offer other adapters from now on, by kind and name. Jobs of those that are gone still run."""
        self._files |= files

    def __getitem__(self, key: AdapterKey) -> Any:
        """The loaded adapter."""
        place = self._place(key)
        self._loaded.move_to_end(place)
        return self._loaded[place].adapter

    def is_loaded(self, key: AdapterKey) -> bool:
        """Whether the adapter is loaded, from a file that has not changed since."""
        loaded = self._loaded.get(self._place(key))
        return loaded is not None and loaded.file == self._file(key)

    def load(self, key: AdapterKey, model: Any) -> None:
        """Load an adapter. model: the loaded model that it is for. Raises the errors of open_()."""
        file = self._file(key)
        self._loaded[self._place(key)] = LoadedAdapter(self._open(key, file, model), file)

    def drop_stale(self, key: AdapterKey, busy: Collection[WeightsKey]) -> bool:
        """Unload the adapter if its file has changed; False if running jobs use it."""
        place = self._place(key)
        if place in self._loaded and not self.is_loaded(key):
            if place in self._places(busy):
                return False
            del self._loaded[place]
        return True

    def size(self, key: AdapterKey) -> int:
        """Bytes that loading an adapter takes: of its weights, and of an encoder that is not loaded."""
        file = self._file(key)
        encoders = {loaded.file.encoder for loaded in self._loaded.values()}
        return file.size + (0 if file.encoder in encoders else file.encoder_size)

    @property
    def used(self) -> int:
        """Bytes of all loaded adapters."""
        files = [loaded.file for loaded in self._loaded.values()]
        encoders = {file.encoder: file.encoder_size for file in files}
        return sum(file.size for file in files) + sum(encoders.values())

    def forget_idle(
        self, busy: Collection[WeightsKey], is_enough: Callable[[], bool] = lambda: False
    ) -> None:
        """Unload adapters that are not busy, the least recently used first, until that is enough."""
        used = self._places(busy)
        for place in [place for place in self._loaded if place not in used]:
            if is_enough():
                break
            del self._loaded[place]

    def forget_model(self, model: str) -> None:
        """Unload adapters that are changes of a model's weights."""
        for place in [place for place in self._loaded if place.model == model]:
            del self._loaded[place]

    def _file(self, key: AdapterKey) -> AdapterFile:
        return self._files[key.kind, key.name]

    def _place(self, key: AdapterKey) -> AdapterKey:
        """The key of the adapter among the loaded ones: without a model if all models share it."""
        return key if self._file(key).of_model else key._replace(model="")

    def _places(self, keys: Collection[WeightsKey]) -> set[AdapterKey]:
        return {self._place(key) for key in keys if isinstance(key, AdapterKey)}

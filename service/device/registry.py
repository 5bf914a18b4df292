"""The registry of models: loaded ones, and copies with LoRAs, within a limit of memory. Imports no torch."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from models.formats.identify import Source
from models.spec import ModelSpec, Prediction
from service.device.adapter_store import AdapterStore
from service.device.contents import Contents
from service.engine.job import AdapterKey, ModelKey, WeightsKey
from service.errors import OutOfMemory
from service.model_paths import identify_all

log = logging.getLogger(__name__)

Bundle = TypeVar("Bundle")


class Merged(NamedTuple, Generic[Bundle]):
    """A copy of a model with LoRAs merged. size: bytes of the weights that are its own."""

    bundle: Bundle
    size: int


class Registry(Generic[Bundle]):
    """Models by name: the specs of all, and the loaded models (bundles) of as many as memory allows.

    `load`: source -> bundle; `size`: spec -> bytes of the weights; `memory`: bytes for all weights, 0
    for no limit. The least recently used models are unloaded first. After offer(), the registry also holds
    copies of models with LoRAs merged. Raises CheckpointError for a model that cannot be read.
    """

    def __init__(
        self,
        paths: Mapping[str, Path | Source],
        load: Callable[[Source], Bundle],
        size: Callable[[ModelSpec], int] = lambda spec: 0,
        memory: int = 0,
        allow_pickle: bool = False,
        prediction: Prediction | None = None,
    ) -> None:
        sources = identify_all(paths, allow_pickle, prediction)
        self.contents = Contents(sources=sources, specs={n: source.spec for n, source in sources.items()})
        # Of all models that were ever served: jobs of a model that is no longer listed still run.
        self.sources, self.specs = dict(sources), dict(self.contents.specs)
        self._load, self._size = load, size
        self._sizes: dict[str, int] = {}
        self._memory = memory
        self._loaded: OrderedDict[str, Bundle] = OrderedDict()  # least recently used first
        self._merged: OrderedDict[ModelKey, Merged[Bundle]] = OrderedDict()  # copies with LoRAs, likewise
        self._stale: set[ModelKey] = set()  # loaded or merged from files that have changed or are not listed
        self._max_merged = 0
        self.adapters = AdapterStore()  # controls and reference adapters, within the same limit of memory
        self.loading = False  # True while a model loads; read by another thread
        self.on_change: Callable[[], None] = lambda: None  # called when other models are loaded

    def offer(
        self,
        open_loras: Callable[[ModelSpec, Sequence[str]], Sequence[Any]],
        apply: Callable[[Bundle, Sequence[tuple[Any, float, float]]], Bundle],
        size: Callable[[Sequence[Any]], int],
        max_merged: int,
    ) -> None:
        """Make LoRAs available.

        `open_loras`: the LoRAs of these names that fit a model; `apply`: makes a copy of a bundle with LoRAs
        merged, each with its weights for the UNet and for the text encoders; `size`: bytes of such a copy;
        `max_merged`: most copies at the same time.
        """
        self._open, self._apply, self._copy_size, self._max_merged = open_loras, apply, size, max_merged

    def install(self, contents: Contents) -> tuple[str, ...]:
        """Serve other models and LoRAs from now on.

        Returns the loaded models that should be unloaded when no job uses them: their files have changed, or
        they are not listed any more. make_ready() loads a changed one again, and merges changed LoRAs again,
        after the jobs that use it have ended.
        """
        old = {name: self.sources[name] for name in self._loaded}
        current, loras, before = contents.sources, contents.loras, self.contents.loras
        self._stale |= {ModelKey(name) for name in old if current.get(name, old[name]) is not old[name]}
        changed = {name for name in before if loras.get(name, before[name]) != before[name]}
        self._stale |= {key for key in self._merged if changed & {name for name, *_ in key.loras}}
        for name in current:
            if current[name] is not self.sources.get(name):
                self._sizes.pop(name, None)
        self.contents = contents
        self.adapters.install(contents.adapters)
        self.sources |= current
        self.specs |= contents.specs
        return tuple(name for name in old if current.get(name) is not old[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.contents.sources)

    def __getitem__(self, name: str) -> Bundle:
        """The model; loads it if necessary. Raises KeyError for a name that was never served."""
        if name not in self._loaded:
            self.load(name, self._loaded.keys())
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def bundle(self, key: ModelKey) -> Bundle:
        """The model with its LoRAs merged; loads and merges if necessary. Raises KeyError."""
        model = self[key.model]
        if not key.loras:
            return model
        if key not in self._merged:
            loras = self._loras_of(key)
            self._merged[key] = Merged(
                self._apply(model, loras), self._copy_size([lora for lora, *_ in loras])
            )
        self._merged.move_to_end(key)
        return self._merged[key].bundle

    def merged(self, model: Bundle, key: ModelKey) -> Bundle:
        """A copy of `model` with the LoRAs of `key`; the model itself if there are none."""
        return self._apply(model, self._loras_of(key)) if key.loras else model

    def held(self) -> tuple[ModelKey, ...]:
        """The loaded models, and those with LoRAs merged. May be called from another thread."""
        return (*map(ModelKey, list(self._loaded)), *list(self._merged))

    def is_loaded(self, name: str) -> bool:
        """Whether the model is loaded."""
        return name in self._loaded

    def is_ready(self, key: WeightsKey) -> bool:
        """Whether a model with its LoRAs, or an adapter, is loaded from files that have not changed since."""
        if isinstance(key, AdapterKey):
            return self.adapters.is_loaded(key)
        current = not {key, ModelKey(key.model)} & self._stale
        return current and self.is_loaded(key.model) and (not key.loras or key in self._merged)

    def loaded(self) -> dict[str, tuple[Bundle, int]]:
        """Loaded models and the bytes of their weights."""
        return {name: (bundle, self._size_of(name)) for name, bundle in self._loaded.items()}

    def replace(self, name: str, bundle: Bundle) -> None:
        """Use another bundle of the same size for a loaded model from now on, also for copies with LoRAs."""
        self._forget([key for key in self._merged if key.model == name])
        self._loaded[name] = bundle
        self.on_change()

    def bundles(self) -> list[Bundle]:
        """All loaded models and merged copies."""
        return [*self._loaded.values(), *(merged.bundle for merged in self._merged.values())]

    def make_ready(self, key: WeightsKey, busy: Collection[WeightsKey]) -> bool:
        """Load the model and merge its LoRAs if necessary, or load the adapter; may unload what is not busy.

        False if it does not fit in memory together with what is busy, or if its files have changed and
        running jobs still use the old ones.
        """
        if isinstance(key, AdapterKey):
            return self.is_ready(key) or self._load_adapter(key, busy)
        models = {other.model for other in busy}
        if not self._drop_stale(key, busy):
            return False
        if not self.is_loaded(key.model):
            if self._memory:  # merged copies and adapters go first, because they are quick to make again
                self._forget(other for other in list(self._merged) if other not in busy)
                self.adapters.forget_idle(busy)
            if not self.load(key.model, models):
                return False
        return self.is_ready(key) or self._merge(key, busy)

    def _drop_stale(self, key: ModelKey, busy: Collection[WeightsKey]) -> bool:
        """Unload what was loaded for `key` from files that have changed; False if running jobs use it."""
        if ModelKey(key.model) in self._stale:
            if any(other.model == key.model for other in busy):
                return False
            self.unload(key.model)
        elif key in self._stale:
            if key in busy:
                return False
            self._forget([key])
        return True

    def _load_adapter(self, key: AdapterKey, busy: Collection[WeightsKey]) -> bool:
        """Load an adapter; False as in make_ready()."""
        if not self.adapters.drop_stale(key, busy):
            return False
        size = self.adapters.size(key)
        self.adapters.forget_idle(busy, lambda: self._fits(size))
        if not self._make_room(size, busy) and busy:
            return False
        with self._while_loading():
            self.adapters.load(key, self[key.model])
        return True

    def _make_room(self, size: int, busy: Collection[WeightsKey]) -> bool:
        """Unload merged copies and models that are not busy until `size` bytes fit; whether they do now."""
        for copy in [copy for copy in self._merged if copy not in busy]:
            if not self._fits(size):
                self._forget([copy])
        needed = {other.model for other in busy}
        for model in [model for model in self._loaded if model not in needed]:
            if not self._fits(size):
                self.unload(model)
        return self._fits(size)

    def _merge(self, key: ModelKey, busy: Collection[WeightsKey]) -> bool:
        """Merge the LoRAs of `key` into a copy of its loaded model; False as in make_ready()."""
        size = self._copy_size([lora for lora, *_ in self._loras_of(key)])
        idle = [other for other in self._merged if other not in busy]
        if len(self._merged) - len(idle) >= self._max_merged:
            return False
        while idle and (len(self._merged) >= self._max_merged or not self._fits(size)):
            self._forget([idle.pop(0)])
        self.adapters.forget_idle(busy, lambda: self._fits(size))
        if not self._make_room(size, {*busy, ModelKey(key.model)}) and busy:
            return False
        with self._while_loading():
            self.bundle(key)
        return True

    def load(self, name: str, busy: Collection[str] = ()) -> bool:
        """Load a model; may unload others that are not busy.

        False if it does not fit in memory together with the busy models. If no busy model is loaded, the
        model is loaded whatever its size.
        """
        size = self._size_of(name) if self._memory else 0
        used = self._used_by(busy) + self.adapters.used
        if used + size > self._memory > 0 and any(map(self.is_loaded, busy)):
            return False
        for other in [other for other in self._loaded if other not in busy]:
            if self._fits(size):
                break
            self.unload(other)
        with self._while_loading():
            self._loaded[name] = self._load(self.sources[name])
        self.on_change()
        return True

    def load_all(self, names: Iterable[str] | None = None) -> None:
        """Load these models (None: all), in order, except those for which there is no room.

        Raises OutOfMemory if no model could be loaded.
        """
        for name in self if names is None else names:
            try:
                self.load(name, tuple(self._loaded))
            except OutOfMemory:
                if not self._loaded:
                    raise
                log.warning("model %s does not fit in memory with those loaded; requests will load it", name)

    def unload_idle(self, busy: Collection[WeightsKey]) -> None:
        """Unload every model, merged copy and adapter that is not busy."""
        self.adapters.forget_idle(busy)
        self._forget(key for key in list(self._merged) if key not in busy)
        models = {key.model for key in busy}
        for name in [name for name in self._loaded if name not in models]:
            self.unload(name)

    def unload(self, name: str) -> None:
        """Unload a model, its merged copies and the adapters made for it; one not loaded is left alone."""
        if name in self._loaded:
            self._forget(key for key in list(self._merged) if key.model == name)
            self.adapters.forget_model(name)
            del self._loaded[name]
            self._stale.discard(ModelKey(name))
            self.on_change()

    @contextmanager
    def _while_loading(self) -> Iterator[None]:
        self.loading = True
        try:
            yield
        finally:
            self.loading = False

    def _loras_of(self, key: ModelKey) -> list[tuple[Any, float, float]]:
        """The LoRAs and their weights."""
        opened = self._open(self.specs[key.model], [name for name, *_ in key.loras])
        return [(lora, *weights) for lora, (_, *weights) in zip(opened, key.loras, strict=True)]

    def _forget(self, keys: Iterable[ModelKey]) -> None:
        for key in keys:
            del self._merged[key]
            self._stale.discard(key)

    def _size_of(self, name: str) -> int:
        """Bytes of a model's weights."""
        if name not in self._sizes:
            self._sizes[name] = self._size(self.specs[name])
        return self._sizes[name]

    def _fits(self, size: int) -> bool:
        """Whether `size` more bytes fit in memory with everything that is loaded."""
        used = self._used_by(self._loaded) + self.adapters.used
        return not self._memory or used + size <= self._memory

    def _used_by(self, names: Iterable[str]) -> int:
        """Bytes of the loaded models among `names`, and of their merged copies."""
        loaded = {name for name in names if name in self._loaded}
        copies = sum(merged.size for key, merged in self._merged.items() if key.model in loaded)
        return sum(map(self._size_of, loaded)) + copies

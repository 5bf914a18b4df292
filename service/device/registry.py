"""The registry of models: loaded ones, and copies with LoRAs, within a limit of memory. Imports no torch."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from models.formats.identify import Source
from models.spec import FewStep, ModelSpec, Prediction
from service.engine.job import ModelKey
from service.errors import OutOfMemory
from service.model_paths import identify_all

log = logging.getLogger(__name__)

Bundle = TypeVar("Bundle")
Lora = TypeVar("Lora")


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
        self.sources = identify_all(paths, allow_pickle, prediction)
        self.specs = {name: source.spec for name, source in self.sources.items()}
        self._load = load
        self._sizes = {name: size(spec) for name, spec in self.specs.items()} if memory else {}
        self._memory = memory
        self._loaded: OrderedDict[str, Bundle] = OrderedDict()  # least recently used first
        self._merged: OrderedDict[ModelKey, Bundle] = OrderedDict()  # copies with LoRAs, in the same order
        self._loras: Mapping[str, Mapping[str, Any]] = {}
        self._max_merged = 0
        self.loading = False  # True while a model loads; read by another thread

    def offer(
        self,
        loras: Mapping[str, Mapping[str, Lora]],
        apply: Callable[[Bundle, Sequence[tuple[Lora, float, float]]], Bundle],
        size: Callable[[Sequence[Lora]], int],
        max_merged: int,
        warn: Callable[[str, Lora], str] = lambda name, lora: "",
        usual: Callable[[Lora], FewStep | None] = lambda lora: None,
    ) -> None:
        """Make LoRAs available.

        `loras`: model -> name -> LoRA, of those that fit; `apply`: makes a copy of a bundle with LoRAs
        merged, each with its weights for the UNet and for the text encoders; `size`: bytes of such a copy;
        `max_merged`: most copies at the same time; `warn`: a warning about parts of a LoRA that its model
        ignores, or an empty text; `usual`: the usual settings of a LoRA for few steps.
        """
        self._loras, self._apply, self._copy_size, self._max_merged = loras, apply, size, max_merged
        for model, spec in self.specs.items():
            own = loras.get(model, {})
            warnings = tuple(warn(name, lora) for name, lora in own.items())
            settings = tuple(map(usual, own.values()))
            self.specs[model] = replace(
                spec, loras=tuple(own), lora_warnings=warnings, lora_settings=settings
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __getitem__(self, name: str) -> Bundle:
        """The model; loads it if necessary. Raises KeyError for a name that was not given at start-up."""
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
            self._merged[key] = self.merged(model, key)
        self._merged.move_to_end(key)
        return self._merged[key]

    def merged(self, model: Bundle, key: ModelKey) -> Bundle:
        """A copy of `model` with the LoRAs of `key`; the model itself if there are none."""
        return self._apply(model, self._loras_of(key)) if key.loras else model

    def held(self) -> tuple[ModelKey, ...]:
        """The loaded models, and those with LoRAs merged. May be called from another thread."""
        return (*map(ModelKey, list(self._loaded)), *list(self._merged))

    def is_loaded(self, name: str) -> bool:
        """Whether the model is loaded."""
        return name in self._loaded

    def is_ready(self, key: ModelKey) -> bool:
        """Whether the model is loaded and its LoRAs are merged."""
        return self.is_loaded(key.model) and (not key.loras or key in self._merged)

    def make_ready(self, key: ModelKey, busy: Collection[ModelKey]) -> bool:
        """Load the model and merge its LoRAs if necessary; may unload models that are not busy.

        False if it does not fit in memory together with the busy models.
        """
        models = {other.model for other in busy}
        if not self.is_loaded(key.model):
            if self._memory:  # merged copies go first, because they are quick to make again
                self._forget(other for other in list(self._merged) if other not in busy)
            if not self.load(key.model, models):
                return False
        return self.is_ready(key) or self._merge(key, busy)

    def _merge(self, key: ModelKey, busy: Collection[ModelKey]) -> bool:
        """Merge the LoRAs of `key` into a copy of its loaded model; False as in make_ready()."""
        size = self._merged_size(key)
        idle = [other for other in self._merged if other not in busy]
        if len(self._merged) - len(idle) >= self._max_merged:
            return False
        while idle and (len(self._merged) >= self._max_merged or not self._fits(size)):
            self._forget([idle.pop(0)])
        needed = {other.model for other in busy} | {key.model}
        for model in [model for model in self._loaded if model not in needed]:
            if not self._fits(size):
                self._unload(model)
        if busy and not self._fits(size):
            return False
        with self._while_loading():
            self.bundle(key)
        return True

    def load(self, name: str, busy: Collection[str] = ()) -> bool:
        """Load a model; may unload others that are not busy.

        False if it does not fit in memory together with the busy models. If no busy model is loaded, the
        model is loaded whatever its size.
        """
        size = self._sizes.get(name, 0)
        if self._used_by(busy) + size > self._memory > 0 and any(map(self.is_loaded, busy)):
            return False
        for other in [other for other in self._loaded if other not in busy]:
            if self._fits(size):
                break
            self._unload(other)
        with self._while_loading():
            self._loaded[name] = self._load(self.sources[name])
        return True

    def load_all(self) -> None:
        """Load the first model, and those after it for which there is room. Raises OutOfMemory."""
        for name in self.sources:
            try:
                self.load(name, tuple(self._loaded))
            except OutOfMemory:
                if not self._loaded:
                    raise
                log.warning("model %s does not fit in memory with those loaded; requests will load it", name)

    def unload_idle(self, busy: Collection[ModelKey]) -> None:
        """Unload every model and every merged copy that is not busy."""
        self._forget(key for key in list(self._merged) if key not in busy)
        models = {key.model for key in busy}
        for name in [name for name in self._loaded if name not in models]:
            self._unload(name)

    @contextmanager
    def _while_loading(self) -> Iterator[None]:
        self.loading = True
        try:
            yield
        finally:
            self.loading = False

    def _loras_of(self, key: ModelKey) -> list[tuple[Any, float, float]]:
        """The LoRAs and their weights."""
        return [(self._loras[key.model][name], unet, text) for name, unet, text in key.loras]

    def _merged_size(self, key: ModelKey) -> int:
        """Bytes of the merged copy."""
        return self._copy_size([lora for lora, *_ in self._loras_of(key)])

    def _unload(self, name: str) -> None:
        """Unload a model and its merged copies."""
        self._forget(key for key in list(self._merged) if key.model == name)
        del self._loaded[name]

    def _forget(self, keys: Iterable[ModelKey]) -> None:
        for key in keys:
            del self._merged[key]

    def _fits(self, size: int) -> bool:
        """Whether `size` more bytes fit in memory with everything that is loaded."""
        return not self._memory or self._used_by(self._loaded) + size <= self._memory

    def _used_by(self, names: Iterable[str]) -> int:
        """Bytes of the loaded models among `names`, and of their merged copies."""
        loaded = {name for name in names if name in self._loaded}
        copies = sum(self._merged_size(key) for key in self._merged if key.model in loaded)
        return sum(self._sizes.get(name, 0) for name in loaded) + copies

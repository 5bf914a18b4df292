"""Which models are loaded, and which merged with LoRAs. Generic over the loaded model: no torch here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from models.formats.identify import Source
from models.spec import ModelSpec, Prediction
from service.engine.job import ModelKey
from service.model_paths import identify_all

Bundle = TypeVar("Bundle")
Lora = TypeVar("Lora")


class Registry(Generic[Bundle]):
    """Models by name: what they are, always; their bundles, as many as the memory allows.

    load: source -> bundle; size: spec -> bytes of its weights; memory: bytes for all weights together, 0 for
    no limit. Of what must go, the least recently used goes first. Raises CheckpointError for a model
    that cannot be read. Beside a model there are its copies with sets of LoRAs, where offer() has some.
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
        self._loaded: OrderedDict[str, Bundle] = OrderedDict()  # the least recently used first
        self._merged: OrderedDict[ModelKey, Bundle] = OrderedDict()  # the same, of models with LoRAs
        self._loras: Mapping[str, Mapping[str, Any]] = {}
        self._sets = 0
        self.loading = False  # right now, in another thread than the one that asks

    def offer(
        self,
        loras: Mapping[str, Mapping[str, Lora]],
        apply: Callable[[Bundle, Sequence[tuple[Lora, float]]], Bundle],
        size: Callable[[Sequence[Lora]], int],
        sets: int,
    ) -> None:
        """Let models be asked for with LoRAs.

        loras: those that fit, by model and name; apply: a bundle beside the one given, which stays as it is;
        size: bytes that it takes beside it; sets: how many such bundles there are at a time, at most.
        """
        self._loras, self._apply, self._changed, self._sets = loras, apply, size, sets
        self.specs = {m: replace(spec, loras=tuple(loras.get(m, ()))) for m, spec in self.specs.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __getitem__(self, name: str) -> Bundle:
        """The bundle, loaded now if it is not. Raises KeyError for a name not given at start-up."""
        if name not in self._loaded:
            self.load(name, self._loaded.keys())
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def bundle(self, network: ModelKey) -> Bundle:
        """The model, or the model with its LoRAs, made now if it is not there. Raises KeyError."""
        model = self[network.model]
        if not network.loras:
            return model
        if network not in self._merged:
            self._merged[network] = self.changed(model, network)
        self._merged.move_to_end(network)
        return self._merged[network]

    def changed(self, model: Bundle, network: ModelKey) -> Bundle:
        """A bundle of the network's model with its LoRAs."""
        return self._apply(model, self._chosen(network)) if network.loras else model

    def holds(self, name: str) -> bool:
        return name in self._loaded

    def has(self, network: ModelKey) -> bool:
        """Whether a job can run on it right now."""
        return self.holds(network.model) and (not network.loras or network in self._merged)

    def ready(self, network: ModelKey, busy: Collection[ModelKey]) -> bool:
        """Load and merge what is missing of a network, in the place of what is not busy; False if it does not
        fit beside the busy."""
        models = {other.model for other in busy}
        if not self.holds(network.model):
            if self._memory:  # what is merged goes first: it is made again in no time
                self._forget(other for other in list(self._merged) if other not in busy)
            if not self.load(network.model, models):
                return False
        return self.has(network) or self._merge(network, busy)

    def _merge(self, network: ModelKey, busy: Collection[ModelKey]) -> bool:
        """Merge a network's LoRAs into a copy of its model, as ready()."""
        size = self._changed([lora for lora, _ in self._chosen(network)])
        idle = [other for other in self._merged if other not in busy]
        if len(self._merged) - len(idle) >= self._sets:
            return False
        while idle and (len(self._merged) >= self._sets or not self._fits(size)):
            self._forget([idle.pop(0)])
        needed = {other.model for other in busy} | {network.model}
        for model in [model for model in self._loaded if model not in needed]:
            if not self._fits(size):
                self._unload(model)
        if busy and not self._fits(size):
            return False
        self.loading = True
        try:
            self.bundle(network)
        finally:
            self.loading = False
        return True

    def load(self, name: str, busy: Collection[str] = ()) -> bool:
        """Load a model, in the place of others that are not busy; False if it does not fit beside the busy.

        Beside nothing it is loaded whatever its size.
        """
        if self._taken(busy) + self._sizes.get(name, 0) > self._memory > 0 and self._holds_any(busy):
            return False
        for other in [other for other in self._loaded if other not in busy]:
            if self._fits(self._sizes.get(name, 0)):
                break
            self._unload(other)
        self.loading = True
        try:
            self._loaded[name] = self._load(self.sources[name])
        finally:
            self.loading = False
        return True

    def load_all(self) -> None:
        """Load the first model, and those after it that fit beside what is loaded."""
        for name in self.sources:
            self.load(name, tuple(self._loaded))

    def _chosen(self, network: ModelKey) -> list[tuple[Lora, float]]:
        """A network's LoRAs and their weights."""
        return [(self._loras[network.model][name], weight) for name, weight in network.loras]

    def _unload(self, name: str) -> None:
        """Forget a model, and what is merged with it."""
        self._forget(network for network in list(self._merged) if network.model == name)
        del self._loaded[name]

    def _forget(self, networks: Iterable[ModelKey]) -> None:
        for network in networks:
            del self._merged[network]

    def _fits(self, size: int) -> bool:
        """Whether so many bytes go beside all that is loaded."""
        return not self._memory or self._taken(self._loaded) + size <= self._memory

    def _taken(self, names: Iterable[str]) -> int:
        """Bytes of those of these models that are loaded, and of what is merged with them."""
        there = {name for name in names if name in self._loaded}
        merged = (self._chosen(network) for network in self._merged if network.model in there)
        beside = (self._changed([lora for lora, _ in chosen]) for chosen in merged)
        return sum(self._sizes.get(name, 0) for name in there) + sum(beside)

    def _holds_any(self, names: Iterable[str]) -> bool:
        return any(name in self._loaded for name in names)

"""What is in the files that may be served: models, and the LoRAs, embeddings and VAEs that fit them.

Files given by path at start-up must be right. Files of the catalogue that cannot be used are ignored, with
the reason. Only headers are read here, and each file only once until it changes.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from models.adapters import lora, replacement_vae, textual_inversion, tiny_vae
from models.adapters.lora import Lora, OpenedLora
from models.adapters.lora_changes import Problems
from models.adapters.lora_targets import Layer, find_layers
from models.adapters.textual_inversion import Embedding
from models.checkpoint import load
from models.errors import CheckpointError
from models.formats import companions
from models.formats.identify import Source, refreshed
from models.latent_diffusion import LatentDiffusion
from models.networks.tiny_autoencoder import TinyDecoder
from models.spec import FewStep, ModelSpec, TextSpec, UNetSpec
from models.stopwatch import Stopwatch
from service.catalogue import Catalogue, Entry, Ignored
from service.device.adapters import Adapters
from service.device.contents import Contents
from service.device.cpu_backend import CpuBackend
from service.device.select import prepare_for_device
from service.device.shelf import Shelf, given
from service.device.torch_errors import translate_oom
from service.errors import LoraUnreadable, ModelUnreadable
from service.model_paths import TINY_VAE, identify_all, locate_embeddings, locate_loras, locate_vaes
from service.setting_values import LORA_NAME, PROMPT_WORD
from service.settings import Settings

log = logging.getLogger(__name__)

Value = TypeVar("Value")
Structure = tuple[UNetSpec | None, tuple[TextSpec, ...]]

NOT_A_WORD = (
    "its name cannot be a word of a prompt: it has spaces, brackets, colons or more than 64 characters"
)


class Library:
    """Reads models and adapters.

    paths: the models given at start-up. Raises CheckpointError for one of them, or for an adapter given at
    start-up, that cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        paths: Mapping[str, Path | Source],
        device: torch.device,
        dtype: torch.dtype,
        catalogue: Catalogue,
        watch: Stopwatch | None = None,
        backend: CpuBackend | None = None,
    ) -> None:
        self.settings, self.device, self.dtype, self.watch = settings, device, dtype, watch
        self.backend = backend or CpuBackend()
        self.vocabulary = Path(settings.vocabulary) if settings.vocabulary else None
        names = dict.fromkeys((*paths, *(entry.name for entry in catalogue.of("model"))))
        self.vaes = locate_vaes(settings.vae, names)
        self.tiny_vaes = locate_vaes(settings.tiny_vae, names, TINY_VAE)
        self.lora_files = locate_loras(settings.lora)
        self.embedding_files = locate_embeddings(settings.embedding)
        self.adapters = Adapters(settings, device, dtype)
        self.known: Mapping[Hashable, Any] = {}  # what was read, by file and version
        self.layers: dict[Structure, dict[str, Layer]] = {}
        self.given_paths = {name: path for name, path in paths.items() if isinstance(path, Path)}
        separate = catalogue.separate_vaes(self.given_paths)
        self.given = self.identify(
            paths, {name: Path(vae.path) for name, vae in separate.items()} | self.vaes
        )
        self.ignored: tuple[Ignored, ...] = ()

    def identify(self, paths: Mapping[str, Path | Source], vaes: Mapping[str, Path]) -> dict[str, Source]:
        """Identify models. vaes: those that replace a model's own. Raises CheckpointError."""
        settings = self.settings
        allow_pickle = settings.allow_pickle
        sources = identify_all(paths, allow_pickle, settings.prediction, settings.weights, vaes)
        for name, source in sources.items():
            uses_bert = source.spec.uses_bert_tokens
            if uses_bert and companions.find_vocabulary(source.folder, self.vocabulary) is None:
                raise CheckpointError(f"{name}: {companions.VOCABULARY_MISSING}")
            if vae := vaes.get(name):  # one of the wrong shape fails here, not when the model is loaded
                replacement_vae.open_vae(vae, source.spec.autoencoder, "cpu", allow_pickle)
            if tiny := self.tiny_vaes.get(name):
                tiny_vae.open_decoder(tiny, source.spec.autoencoder, allow_pickle=allow_pickle)
        return sources

    def check_given(self, specs: Mapping[str, ModelSpec]) -> None:
        """Raise CheckpointError for an adapter given at start-up that fits no model."""
        allow_pickle = self.settings.allow_pickle
        lora.open_loras(self.lora_files, specs, "cpu", allow_pickle)
        textual_inversion.read_embeddings(self.embedding_files, specs.values(), allow_pickle)
        self.adapters.check_given(specs)

    def read(self, catalogue: Catalogue) -> Contents:
        """What can be served of a catalogue, with what was given at start-up."""
        shelf = Shelf(self.known, list(catalogue.ignored))
        found, vaes = self.read_models(catalogue, shelf)
        sources = self.given | found
        specs = {name: source.spec for name, source in sources.items()}
        embeddings = self.read_embeddings(catalogue, specs, shelf)
        loras = self.read_loras(catalogue, specs, shelf)
        for name, spec in specs.items():
            fitting = tuple(each.name for each in embeddings if each.fits(spec))
            specs[name] = replace(
                spec,
                loras=tuple(loras[name]),
                lora_warnings=tuple(use.warning for use in loras[name].values()),
                lora_settings=tuple(use.few_step for use in loras[name].values()),
                embeddings=fitting,
                tiny_decoder=name in self.tiny_vaes,
            )
        specs, adapters = self.adapters.read(catalogue, specs, shelf)
        self.known = shelf.used
        files = {entry.name: entry for entry in (*given("lora", self.lora_files), *catalogue.of("lora"))}
        for file in shelf.ignored:
            if file not in self.ignored:
                log.warning("%s is ignored: %s", *file)
        self.ignored = tuple(shelf.ignored)
        return Contents(catalogue.number, sources, specs, files, vaes, embeddings, adapters, self.ignored)

    def read_models(self, catalogue: Catalogue, shelf: Shelf) -> tuple[dict[str, Source], dict[str, Path]]:
        """The models of a catalogue, and the VAEs of models: given, or in NAME.vae beside the model."""
        separate, sources = catalogue.separate_vaes(self.given_paths), {}
        vaes = {name: Path(vae.path) for name, vae in separate.items()} | self.vaes
        for entry in catalogue.of("model"):
            read = partial(self.identify_found, entry, vaes)
            if source := shelf.read(entry, read, separate.get(entry.name)):
                sources[entry.name] = source
        return sources, vaes

    def identify_found(self, entry: Entry, vaes: Mapping[str, Path]) -> Source:
        """Identify a model of the catalogue. Raises CheckpointError."""
        (source,) = self.identify({entry.name: Path(entry.path)}, vaes).values()
        return source

    def read_embeddings(
        self, catalogue: Catalogue, specs: Mapping[str, ModelSpec], shelf: Shelf
    ) -> tuple[Embedding, ...]:
        """The embeddings that fit at least one model."""
        found = []
        for entry in (*given("embedding", self.embedding_files), *catalogue.of("embedding")):
            read = partial(read_embedding, entry, self.settings.allow_pickle)
            if embedding := shelf.read(entry, read):
                if any(embedding.fits(spec) for spec in specs.values()):
                    found.append(embedding)
                else:
                    widths = textual_inversion.joined(embedding.widths)
                    shelf.ignore(entry, f"its vectors are {widths} wide, which fits no model")
        return tuple(found)

    def read_loras(
        self, catalogue: Catalogue, specs: Mapping[str, ModelSpec], shelf: Shelf
    ) -> dict[str, dict[str, LoraUse]]:
        """Model -> name -> use, of the LoRAs that fit the model."""
        fitting: dict[str, dict[str, LoraUse]] = {model: {} for model in specs}
        structures = {structure_of(spec): spec for spec in specs.values()}
        for entry in (*given("lora", self.lora_files), *catalogue.of("lora")):
            fits = shelf.read(entry, partial(self.fit_lora, entry, structures), tuple(structures))
            if fits is None:
                continue
            for model, spec in specs.items():
                if use := fits.uses.get(structure_of(spec)):
                    fitting[model][entry.name] = use
            if not fits.uses:
                shelf.ignore(entry, f"it {fits.problem}")
        return fitting

    def fit_lora(self, entry: Entry, structures: Mapping[Structure, ModelSpec]) -> LoraFit:
        """Which models a LoRA fits. Raises CheckpointError for a file that is no LoRA."""
        if not LORA_NAME.fullmatch(entry.name):
            raise CheckpointError("its name cannot be written as <lora:name:weight>")
        opened = OpenedLora(entry.name, Path(entry.path), "cpu", self.settings.allow_pickle)
        uses: dict[Structure, LoraUse] = {}
        problems: dict[str, Problems] = {}
        for structure, spec in structures.items():
            ignored, found = opened.match(self.layers_of(spec), spec)
            if found:
                problems[spec.name] = found
            else:
                uses[structure] = LoraUse(lora.ignored_warning(entry.name, ignored), opened.few_step)
        return LoraFit(uses, "" if uses else lora.closest(problems))

    def layers_of(self, spec: ModelSpec) -> dict[str, Layer]:
        key = structure_of(spec)
        if key not in self.layers:
            self.layers[key] = find_layers(spec)
        return self.layers[key]

    def load(self, source: Source, contents: Contents) -> LatentDiffusion:
        """Load a model, with its VAE and embeddings. Raises ModelUnreadable, and OutOfMemory."""
        spec, device, dtype = source.spec, self.device, self.dtype
        vae = None if source.vae else contents.vaes.get(spec.name)  # a source's VAE is loaded with it
        try:
            current = refreshed(source)
            if current.spec != spec:
                raise CheckpointError(f"{source.path} contains another model than when it was read")
            with translate_oom():
                model = load(current, device, dtype, vocabulary=self.vocabulary, watch=self.watch)
                if vae:
                    allow_pickle = self.settings.allow_pickle
                    model = replacement_vae.with_vae(model, vae, device, dtype, allow_pickle)
                textual_inversion.add_embeddings(model, contents.embeddings)
                model = prepare_for_device(model, device)
                self.backend.apply(model)
                if self.watch:
                    self.watch.lap("backend")
                model.tiny_decoder = self.open_tiny_decoder(spec)
                return model
        except (CheckpointError, OSError) as error:
            raise ModelUnreadable from error

    def open_tiny_decoder(self, spec: ModelSpec) -> TinyDecoder | None:
        """The tiny VAE's decoder that was given for a model. Raises CheckpointError."""
        path, allow_pickle = self.tiny_vaes.get(spec.name), self.settings.allow_pickle
        if path is None:
            return None
        return tiny_vae.open_decoder(path, spec.autoencoder, self.device, self.dtype, allow_pickle)

    def open_loras(self, model: ModelSpec, names: Sequence[str], contents: Contents) -> list[Lora]:
        """LoRAs that fit a model, by name. Raises LoraUnreadable."""
        layers = self.layers_of(model)
        try:
            return [self.open_lora(contents.loras[name], layers, model) for name in names]
        except (CheckpointError, OSError, LookupError) as error:
            raise LoraUnreadable from error

    def open_lora(self, entry: Entry, layers: Mapping[str, Layer], model: ModelSpec) -> Lora:
        file = Path(entry.path)
        opened = OpenedLora(entry.name, file, self.device, self.settings.allow_pickle)
        found, problems = opened.fit(layers, model)
        if problems:
            raise CheckpointError(f"LoRA {entry.name} ({file}) {lora.closest({model.name: problems})}")
        return found


class LoraUse(NamedTuple):
    """A warning about parts of a LoRA that a model ignores, or ""; and the LoRA's usual settings."""

    warning: str
    few_step: FewStep | None


class LoraFit(NamedTuple):
    """The structures of models that a LoRA fits; if it fits none, a problem."""

    uses: dict[Structure, LoraUse]
    problem: str


def read_embedding(entry: Entry, allow_pickle: bool) -> Embedding:
    if not PROMPT_WORD.fullmatch(entry.name):
        raise CheckpointError(NOT_A_WORD)
    return textual_inversion.read_embedding(entry.name, Path(entry.path), allow_pickle)


def structure_of(spec: ModelSpec) -> Structure:
    """Models with the same structure have the same layers, which LoRAs change."""
    return spec.unet, spec.texts

"""Controls and reference adapters: which models they fit, and how they are loaded."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch

from models.adapters.control_net import Control, open_control
from models.adapters.image_encoder import ImageEncoder, open_image_encoder
from models.adapters.ip_adapter import ReferenceAdapter, open_adapter
from models.checkpoint.meta import shapes_only
from models.errors import CheckpointError
from models.formats.ip_files import is_ip_adapter
from models.formats.single_file import read_header
from models.latent_diffusion import LatentDiffusion
from models.networks.unet import UNet, stack_layers
from models.spec import NEIGHBOURS, ControlOption, ModelSpec
from service.catalogue import Catalogue, Entry
from service.device.adapter_store import AdapterFile
from service.device.shelf import Shelf, given
from service.device.torch_errors import translate_oom
from service.engine.job import AdapterKey
from service.errors import AdapterUnreadable
from service.model_paths import locate_controls, locate_references, located_network
from service.settings import Settings

META = torch.device("meta")  # networks have shapes and no values there, and only headers of files are read
NEIGHBOURS_KEY = ("reference_adapter", NEIGHBOURS)
NO_ENCODER = "an IP-Adapter needs a CLIP image encoder: --image-encoder PATH"


class AdapterFit(NamedTuple):
    """The structures of models that an adapter fits, with a control's option; else a problem."""

    file: AdapterFile
    options: Mapping[Hashable, ControlOption | None]
    problem: str = ""


class Adapters:
    """Finds out which models adapters fit, and loads them."""

    def __init__(self, settings: Settings, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.allow_pickle = device, dtype, settings.allow_pickle
        self.controls = given("control", locate_controls(settings.controlnet))
        self.references = given("reference_adapter", locate_references(settings.reference_adapter))
        paths = (located_network(text, "image encoder") for text in settings.image_encoder)
        self.encoders = given("image_encoder", {str(path): path for path in paths})
        self.loaded_encoders: WeakValueDictionary[str, ImageEncoder] = WeakValueDictionary()

    def read(
        self, catalogue: Catalogue, specs: Mapping[str, ModelSpec], shelf: Shelf
    ) -> tuple[dict[str, ModelSpec], dict[tuple[str, str], AdapterFile]]:
        """The specs with the adapters that fit each model, and the adapters by kind and name."""
        specs, files = dict(specs), dict[tuple[str, str], AdapterFile]()
        structures = {structure_of(spec): spec for spec in specs.values() if spec.unet}
        encoders = (*self.encoders, *catalogue.of("image_encoder"))
        for entry in self._entries(catalogue, shelf):
            read = partial(self.fit, entry, structures, encoders)
            found = shelf.read(entry, read, tuple(structures), encoders)
            if found is None:
                continue
            if not found.options:
                shelf.ignore(entry, found.problem)
                continue
            files[entry.kind, entry.name] = found.file
            for model, spec in specs.items():
                if structure_of(spec) in found.options:
                    specs[model] = with_adapter(spec, entry.name, found.options[structure_of(spec)])
        for model, spec in specs.items():
            if spec.takes_neighbours and (file := self._neighbours(spec, encoders)):
                files[NEIGHBOURS_KEY] = file
                specs[model] = with_adapter(spec, NEIGHBOURS, None)
        return specs, files

    def _neighbours(self, spec: ModelSpec, encoders: Sequence[Entry]) -> AdapterFile | None:
        """The first image encoder whose vectors are as wide as the model's context."""
        for each in encoders:
            with suppress(CheckpointError):
                encoder = open_image_encoder(Path(each.path), META, self.dtype, self.allow_pickle)
                if encoder.spec.projection == spec.unet_spec.context_width:
                    return AdapterFile(each.path, each.version, 0, False, each.path, encoder.bytes)
        return None

    def check_given(self, specs: Mapping[str, ModelSpec]) -> None:
        """Raise CheckpointError for an adapter given at start-up that fits no model."""
        structures = {structure_of(spec): spec for spec in specs.values() if spec.unet}
        for setting, entries in (("controlnet", self.controls), ("reference_adapter", self.references)):
            for entry in entries:
                fit = self.fit(entry, structures, self.encoders)
                if not fit.options:
                    raise CheckpointError(f"{setting} {entry.name}: {fit.problem}")

    def _entries(self, catalogue: Catalogue, shelf: Shelf) -> Iterator[Entry]:
        """All adapters. A1111 keeps IP-Adapters in its folder of ControlNets."""
        yield from (*self.controls, *self.references)
        for entry in catalogue.of("control", "reference_adapter"):
            kind = shelf.read(entry, partial(kind_of, entry, self.allow_pickle))
            if kind is not None:
                yield entry if kind == entry.kind else entry._replace(kind="reference_adapter")

    def fit(
        self, entry: Entry, structures: Mapping[Hashable, ModelSpec], encoders: Sequence[Entry]
    ) -> AdapterFit:
        """Which models an adapter fits; only headers are read. Raises CheckpointError for other files."""
        options: dict[Hashable, ControlOption | None] = {}
        file, problem = AdapterFile(), ""
        for structure, spec in structures.items():
            try:
                if entry.kind == "control":
                    file, options[structure] = self._try_control(entry, spec)
                else:
                    file, options[structure] = self._try_reference(entry, spec, encoders), None
            except CheckpointError as error:
                problem = problem or str(error)
        return AdapterFit(file, options, problem)

    def _try_control(self, entry: Entry, spec: ModelSpec) -> tuple[AdapterFile, ControlOption]:
        with shapes_only():
            unet = UNet(spec.unet_spec)
        control = open_control(Path(entry.path), spec, META, self.dtype, self.allow_pickle, unet)
        kind = control.kind.removeprefix("a ")
        option = ControlOption(
            entry.name, kind, control.types, control.inpaints, control.every_step, control.conditional_only
        )
        return AdapterFile(entry.path, entry.version, control.bytes, bool(control.base)), option

    def _try_reference(self, entry: Entry, spec: ModelSpec, encoders: Sequence[Entry]) -> AdapterFile:
        """The adapter with the first image encoder that it fits. Raises CheckpointError."""
        problem = CheckpointError(NO_ENCODER)
        for each in encoders:
            try:
                encoder = open_image_encoder(Path(each.path), META, self.dtype, self.allow_pickle)
                adapter = open_adapter(entry.path, encoder, spec, META, self.dtype, self.allow_pickle)
            except CheckpointError as error:
                problem = error
            else:
                version = f"{entry.version} {each.version}"
                return AdapterFile(entry.path, version, adapter.bytes, False, each.path, encoder.bytes)
        raise problem

    def open(
        self, key: AdapterKey, file: AdapterFile, model: LatentDiffusion
    ) -> Control | ReferenceAdapter | ImageEncoder:
        """Load an adapter for a loaded model. Raises AdapterUnreadable, and OutOfMemory."""
        unet, device, allow_pickle = model.unet, self.device, self.allow_pickle
        assert unet is not None
        try:
            with translate_oom():
                if key.kind == "reference_adapter":
                    encoder = self._encoder(file.encoder, unet.dtype)
                    if file.path == file.encoder:
                        return encoder
                    return open_adapter(file.path, encoder, model.spec, device, unet.dtype, allow_pickle)
                control = open_control(file.path, model.spec, device, unet.dtype, allow_pickle, unet)
                if device.type == "cuda":  # as prepare_for_device() does it
                    control.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                    stack_layers(control.network)
                return control
        except (CheckpointError, OSError) as error:
            raise AdapterUnreadable from error

    def _encoder(self, path: str, dtype: torch.dtype) -> ImageEncoder:
        """An image encoder, which adapters share while at least one of them is loaded."""
        encoder = self.loaded_encoders.get(path)
        if encoder is None:
            encoder = open_image_encoder(path, self.device, dtype, self.allow_pickle)
            self.loaded_encoders[path] = encoder
        return encoder


def kind_of(entry: Entry, allow_pickle: bool) -> str:
    """The kind of an adapter, by its tensors. Raises CheckpointError."""
    path = Path(entry.path)
    return "reference_adapter" if path.is_file() and has_ip_tensors(path, allow_pickle) else entry.kind


def has_ip_tensors(path: Path, allow_pickle: bool) -> bool:
    return is_ip_adapter(read_header(path, allow_pickle).shapes)


def structure_of(spec: ModelSpec) -> Hashable:
    """Models with the same structure take the same adapters."""
    return spec.unet, spec.autoencoder


def with_adapter(spec: ModelSpec, name: str, option: ControlOption | None) -> ModelSpec:
    """The spec with a control, or without an option with a reference adapter."""
    if option is None:
        return replace(spec, reference_adapters=(*spec.reference_adapters, name))
    return replace(spec, controls=(*spec.controls, option))

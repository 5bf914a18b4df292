"""T2I-Adapters: features for the UNet's encoder from control images (Mou et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.adapter_specs import T2IAdapterSpec
from models.adapters.controls import Rows
from models.checkpoint.meta import shapes_only
from models.checkpoint.parts import Part, load_part, native_part
from models.checkpoint.weights import Weights
from models.errors import CheckpointError
from models.formats import t2i_files
from models.formats.config_files import Config
from models.formats.diffusers_read import translated
from models.formats.structure import checked_structure
from models.networks.adapter_inputs import AdapterInputs
from models.networks.modules import weight_bytes
from models.networks.t2i_adapter import T2IAdapter
from models.networks.unet import skip_widths
from models.spec import ModelSpec, UNetSpec


class Place(NamedTuple):
    """Where a UNet takes a feature. block: the input block, None for the middle block."""

    block: int | None
    channels: int
    halvings: int  # of the latent's size


def places(unet: UNetSpec) -> list[Place]:
    """Where a UNet takes features: at the end of each level, then after the middle block.

    A level without attention takes it after its downsampling, as `diffusers` does; of SDXL it is the first.
    """
    per_level, last = unet.res_blocks + 1, len(unet.channels) - 1
    found = []
    for level, width in enumerate(unet.channels):
        after = int(level < last and not unet.transformer_depth[level])
        found.append(Place(level * per_level + unet.res_blocks + after, width, level + after))
    return [*found, Place(None, unet.channels[-1], last)]


@dataclass(frozen=True)
class T2IControl:
    """A T2I-Adapter that is ready to run; see Control. unet: of the models that it is for."""

    kind: str
    spec: T2IAdapterSpec
    network: T2IAdapter
    unet: UNetSpec

    types = ()
    every_step = False
    conditional_only = False
    inpaints = False
    base = ""

    @property
    def strengths(self) -> int:
        return len(self.spec.channels)

    @property
    def bytes(self) -> int:
        return weight_bytes(self.network)

    def misfit(self, model: ModelSpec) -> str | None:
        return misfit(self.spec, model)

    def fits(self, model: ModelSpec) -> bool:
        return self.misfit(model) is None

    def prepare(self, images: Tensor) -> tuple[Tensor, ...]:
        images = images.mean(1, keepdim=True) if self.spec.image_channels == 1 else images
        features: tuple[Tensor, ...] = self.network(images.to(self.network.dtype))
        return features

    def inputs(self, prepared: tuple[Tensor, ...], rows: Rows, types: Tensor | None = None) -> AdapterInputs:
        by_block = {place.block: x for place, x in zip(places(self.unet), prepared, strict=False)}
        features = tuple(by_block.get(block) for block in range(len(skip_widths(self.unet))))
        return AdapterInputs(features=features, middle=by_block.get(None))


def misfit(spec: T2IAdapterSpec, model: ModelSpec) -> str | None:
    """Why an adapter does not fit a model, as a clause with the numbers of both; None if it does."""
    if model.unet is None:
        return "the model has no UNet"
    taken = places(model.unet)[: len(spec.channels)]
    channels = tuple(place.channels for place in taken)
    factors = tuple(model.autoencoder.factor << place.halvings for place in taken)
    if channels != spec.channels:
        return f"its features have {spec.channels} channels, the model's {channels}"
    if factors != spec.factors:
        return f"its features take {spec.factors} pixels for a cell, the model's {factors}"
    return None


def is_config(config: Config) -> bool:
    """Whether the configuration of a folder is a T2I-Adapter's."""
    return config.get("_class_name") == t2i_files.CLASS


def from_config(
    path: Path,
    config: Config,
    tensors: Weights,
    base: ModelSpec,
    dtype: torch.dtype,
    device: torch.device | str,
) -> T2IControl:
    """The adapter in a diffusers folder. Raises CheckpointError."""
    spec = translated(path / "config.json", t2i_files.spec_of_config, config)
    return opened(path, spec, tensors, base, dtype, device)


def from_file(
    path: Path, tensors: Weights, base: ModelSpec, dtype: torch.dtype, device: torch.device | str
) -> T2IControl:
    """The adapter in a single file. Raises CheckpointError."""
    names = t2i_files.native_names(tensors.shapes)
    shapes = {native: tensors.stored[key].shape for native, key in names.items()}
    with checked_structure(f"the T2I-Adapter {path}"):
        spec = t2i_files.spec_of_tensors(shapes)
    return opened(path, spec, tensors, base, dtype, device)


def opened(
    path: Path,
    spec: T2IAdapterSpec,
    tensors: Weights,
    base: ModelSpec,
    dtype: torch.dtype,
    device: torch.device | str,
) -> T2IControl:
    if reason := misfit(spec, base):
        raise CheckpointError(f"the T2I-Adapter {path} does not fit {base.name}: {reason}")
    with checked_structure(f"the T2I-Adapter {path}"):
        part = part_of(spec, tensors)
    load_part(part, f"the T2I-Adapter {path}", dtype, device)
    assert base.unet is not None
    assert isinstance(part.network, T2IAdapter)
    return T2IControl("a T2I-Adapter", spec, part.network, base.unet)


def part_of(spec: T2IAdapterSpec, tensors: Weights) -> Part:
    """The network on the meta device, and its tensors under native names."""
    with shapes_only():
        network = T2IAdapter(spec)
    return native_part(network, tensors.renamed(t2i_files.native_names(tensors.shapes)))

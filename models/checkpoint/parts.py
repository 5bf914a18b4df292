"""A model on the meta device, its tensors in files, the check that they fit, and their assignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.checkpoint.meta import shapes_only
from models.checkpoint.weights import Weights, summarise_keys
from models.conditioning.conditioner import (
    Conditioner,
    LayoutProjection,
    TextConditioner,
    make_conditioner,
)
from models.conditioning.text_encoder import TextEncoder
from models.errors import CheckpointError
from models.formats import keymaps
from models.formats.companions import VAE_MISSING
from models.formats.identify import Source
from models.formats.safetensors import WEIGHT_TYPES
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from models.spec import ModelSpec

PROJECTION = "text_projection.weight"
HALVES = ("float16", "bfloat16")  # types of the same size: a network with both has a damaged header
RELEASE_BYTES = 2**27  # of a mapped file in memory, besides the weights that stay mapped
ALIGNMENT = 64  # bytes; torch's memory and .ckpt files are aligned to it, safetensors files may not be


class Part(NamedTuple):
    """A network on the meta device, and its tensors in a file."""

    network: nn.Module
    names: Mapping[str, str]  # native parameter -> name in the file
    weights: Weights


class Networks(NamedTuple):
    """The networks of a model; text encoders have no tokenizer yet."""

    unet: UNet | None
    autoencoder: Autoencoder
    conditioner: Conditioner | None


@dataclass(frozen=True)
class OpenedModel:
    """A model on the meta device, and where its weights are. None is read yet."""

    source: Source
    networks: Networks
    parts: tuple[Part, ...]
    leftover: tuple[str, ...] = ()  # unexpected tensors: named like a network's, but used by none
    variants: tuple[str, ...] = ()  # sentences about files that are used for want of the usual ones
    ignored: tuple[str, ...] = ()  # other tensors that no network uses
    duplicates: Mapping[str, str] | None = None  # tensors of a second copy of the first stage -> of the first
    weights: Weights | None = None  # all tensors of a single file

    @property
    def spec(self) -> ModelSpec:
        return self.source.spec

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts about the files that the user should know, no errors."""
        ignored = list(self.ignored)
        return self.source.notes + self.variants + ((summarise_keys("ignored", ignored),) if ignored else ())


def make_networks(spec: ModelSpec) -> Networks:
    """The networks of a model, with initial values."""
    conditioner = make_conditioner(spec.condition)
    if spec.texts:
        channels = spec.layout_channels
        layout = LayoutProjection(spec.texts[0].width, channels) if channels else None
        encoders = [TextEncoder(text, None) for text in spec.texts]
        conditioner = TextConditioner(encoders, layout, spec.labels, spec.zero_null)
    return Networks(UNet(spec.unet) if spec.unet else None, Autoencoder(spec.autoencoder), conditioner)


def make_on_meta(source: Source) -> Networks:
    """The networks on the meta device, without memory. Raises CheckpointError for impossible shapes."""
    try:
        with shapes_only():
            return make_networks(source.spec)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{source.path}: unsupported network structure: {error}") from error


def count_parameters(spec: ModelSpec) -> int:
    """The number of parameters of a model's networks."""
    with shapes_only():
        networks = make_networks(spec)
    return sum(weight.numel() for network in networks if network for weight in network.parameters())


def unet_names(unet: UNet) -> dict[str, str]:
    """Native parameter -> name in a diffusers folder."""
    table = keymaps.unet(unet.spec)
    return {key: keymaps.rename(key, table) for key in unet.state_dict()}


def autoencoder_names(autoencoder: Autoencoder) -> dict[str, str]:
    """Native parameter -> name in a diffusers folder."""
    table = keymaps.autoencoder(autoencoder.spec)
    return {key: keymaps.rename(key, table) for key in autoencoder.state_dict()}


def text_names(text: TextEncoder) -> dict[str, str]:
    """Native parameter -> name in a diffusers folder, without the prefix text_model."""
    return {key: key.removeprefix("transformer.") for key in text.state_dict()}


def prefixed_text_names(text: TextEncoder) -> dict[str, str]:
    """Native parameter -> name in a diffusers folder, as it is written."""
    return {
        key: name if name == PROJECTION else keymaps.TEXT_PREFIX + name
        for key, name in text_names(text).items()
    }


def normalise_attention(weights: Weights) -> Weights:
    """An autoencoder's tensors under the current names, with the attention's matrices (C, C) as 1x1
    convolutions (C, C, 1, 1)."""
    renamed = weights.renamed({keymaps.OLDER_ATTENTION.get(key, key): key for key in weights.stored})
    shaped = {
        key: replace(entry, shape=(*entry.shape, 1, 1))
        if is_attention_matrix(key) and len(entry.shape) == 2
        else entry
        for key, entry in renamed.stored.items()
    }
    return Weights(shaped, renamed.read, renamed.release)


def is_attention_matrix(name: str) -> bool:
    """Whether a tensor of an autoencoder is linear in the diffusers layout and a convolution here."""
    return name in keymaps.OLDER_ATTENTION.values()


def without_text_prefix(weights: Weights) -> Weights:
    """A text encoder's tensors without the prefix text_model, and without buffers."""
    names = {key.removeprefix(keymaps.TEXT_PREFIX): key for key in weights.stored}
    return weights.renamed({new: old for new, old in names.items() if new not in keymaps.TEXT_IGNORED})


def mismatches(part: Part) -> dict[str, list[str]]:
    """Problems with a network's tensors in its file: kind of problem -> names; empty if all fit."""
    stored = part.weights.stored
    shapes = {part.names[key]: tuple(value.shape) for key, value in part.network.state_dict().items()}
    found = {key: stored[key] for key in shapes if key in stored}
    counts = [sum(entry.dtype == name for entry in found.values()) for name in HALVES]
    rarer = HALVES[counts.index(min(counts))] if min(counts) else None
    accepted = [name for name in WEIGHT_TYPES if name != rarer]
    misshaped = {key: entry.shape for key, entry in found.items() if entry.shape != shapes[key]}
    problems = {
        "missing": [key for key in shapes if key not in stored],
        "unexpected": [key for key in stored if key not in shapes],
        "misshaped": [f"{key} {shape} (expected {shapes[key]})" for key, shape in misshaped.items()],
        "mistyped": [f"{key} {entry.dtype}" for key, entry in found.items() if entry.dtype not in accepted],
    }
    return {problem: keys for problem, keys in problems.items() if keys}


def misfits(part: Part) -> list[str]:
    """mismatches() as one text for each problem."""
    return [summarise_keys(problem, keys) for problem, keys in mismatches(part).items()]


def native_part(network: nn.Module, weights: Weights) -> Part:
    """A network whose parameters have the same names in the file."""
    return Part(network, {key: key for key in network.state_dict()}, weights)


def check_part(part: Part, what: str) -> None:
    """Raise CheckpointError unless the network has exactly its tensors; what: the message's beginning."""
    if found := misfits(part):
        raise CheckpointError(f"{what}: {'; '.join(found)}")


def load_part(part: Part, what: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Make a network ready to run. Raises CheckpointError as check_part() does."""
    check_part(part, what)
    assign(part, dtype)
    part.network.requires_grad_(False).eval().to(device)


def problems(opened: OpenedModel) -> list[str]:
    """Problems with the tensors of a model, one sentence each, found without reading their values."""
    found = [f"{type(part.network).__name__}: {misfit}" for part in opened.parts for misfit in misfits(part)]
    if opened.source.lacks_vae:
        found.append(f"it {VAE_MISSING}")
    if opened.leftover:
        found.append(summarise_keys("unexpected", list(opened.leftover)))
    return found


def check(opened: OpenedModel) -> None:
    """Raise CheckpointError unless every network has all its tensors and no tensor is left over."""
    for problem in problems(opened):
        raise CheckpointError(f"{opened.source.path}: {problem}")
    for copy, key in (opened.duplicates or {}).items():
        weights = opened.weights
        if weights and (key not in weights.stored or not torch.equal(weights.read(copy), weights.read(key))):
            raise CheckpointError(f"{copy} differs from {key}: the conditioner is another first stage")


def assign(part: Part, dtype: torch.dtype) -> None:
    """Give a network on the meta device its weights, after check().

    Besides the weights themselves, that takes RELEASE_BYTES and the largest tensor, as what was copied is
    released.
    """
    state, copied = {}, 0
    for key, value in part.network.state_dict().items():
        stored = part.weights.read(part.names[key])  # read to the device, so that the type is converted there
        state[key] = aligned(stored.to(dtype)).reshape(value.shape)
        if state[key].data_ptr() != stored.data_ptr() or stored.device.type != "cpu":
            copied += stored.nbytes
        if copied > RELEASE_BYTES:
            part.weights.release()
            copied = 0
    if copied:
        part.weights.release()
    part.network.load_state_dict(state, strict=True, assign=True)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied to an aligned address on the CPU.

    Otherwise the last bits of results would depend on the layout of the file.
    """
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor

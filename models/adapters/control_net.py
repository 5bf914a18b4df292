"""ControlNets: residuals for the UNet from control images (Zhang et al. 2023).

    open_control()      the network at a path
    Control.prepare()   once for each control image: its embedding
    Control.inputs()    at each step: the residuals of some rows

controls.py has what controls of all kinds share.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models.adapter_specs import ControlNetSpec
from models.adapters import t2i_adapter
from models.adapters.controls import MODES, Control, Mode, Rows, is_active, masked, scaled, weights
from models.adapters.derived_control import derived
from models.checkpoint.meta import shapes_only
from models.checkpoint.parts import Part, load_part
from models.checkpoint.saving import renamed, write_network
from models.checkpoint.weights import NETWORK_FILES, Weights, open_network, open_weights
from models.errors import CheckpointError
from models.formats import control_files, keymaps
from models.formats.config_files import read_json
from models.formats.diffusers_read import translated
from models.formats.structure import checked_structure
from models.networks.adapter_inputs import AdapterInputs
from models.networks.control_net import ControlNet
from models.networks.modules import weight_bytes
from models.networks.unet import UNet, skip_widths
from models.spec import ModelSpec

__all__ = [
    "MODES",
    "Control",
    "Mode",
    "Rows",
    "is_active",
    "masked",
    "open_control",
    "save_control",
    "scaled",
    "weights",
]


@dataclass(frozen=True)
class ControlNetControl:
    """A ControlNet that is ready to run; see Control. base: the only model that it is for, "" for any."""

    kind: str
    spec: ControlNetSpec
    network: ControlNet
    types: tuple[str, ...] = ()
    inpaints: bool = False
    base: str = ""

    every_step = True

    @property
    def strengths(self) -> int:
        return len(skip_widths(self.spec.unet)) + 1

    @property
    def conditional_only(self) -> bool:
        return self.spec.global_pool

    @property
    def bytes(self) -> int:
        return weight_bytes(self.network)

    def misfit(self, model: ModelSpec) -> str | None:
        if self.base and self.base != model.name:
            return f"it was opened as changes of {self.base}'s weights"
        return misfit(self.spec, model)

    def fits(self, model: ModelSpec) -> bool:
        return self.misfit(model) is None

    def prepare(self, images: Tensor) -> tuple[Tensor, ...]:
        images = images.mean(1, keepdim=True) if self.spec.hint_channels == 1 else images
        return (self.network.embed_hint(images.to(self.network.dtype)),)

    def inputs(self, prepared: tuple[Tensor, ...], rows: Rows, types: Tensor | None = None) -> AdapterInputs:
        out = self.network(rows.x, rows.t, rows.context, rows.pooled, *prepared, types)
        skips, middle = out.skips, out.middle
        if self.spec.global_pool:
            *skips, middle = (x.mean((2, 3), keepdim=True).expand_as(x) for x in (*skips, middle))
        return AdapterInputs(tuple(skips), middle)


def misfit(spec: ControlNetSpec, model: ModelSpec) -> str | None:
    """Why a ControlNet does not fit a model, as a clause with the numbers of both; None if it does."""
    own, base = spec.unet, model.unet
    if base is None:
        return "the model has no UNet"
    attends = own.middle_depth or any(own.transformer_depth)
    pairs = (
        ("its cross-attention takes contexts {} wide, the model's are {} wide",
         own.context_width if attends else 0, base.context_width if attends else 0),
        ("it takes latents of {} channels, the model's have {}", own.in_channels,
         model.autoencoder.latent_channels),
        ("its input blocks have {} channels, the model's {}", skip_widths(own), skip_widths(base)),
        ("its pooled vector has {} numbers, the model's {}", own.added_width, base.added_width),
        ("it takes {} pixels for a latent cell, the model's VAE {}", spec.factor, model.autoencoder.factor),
    )  # fmt: skip
    return next((text.format(mine, theirs) for text, mine, theirs in pairs if mine != theirs), None)


def open_control(
    path: str | Path,
    base: ModelSpec,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    unet: UNet | None = None,
) -> Control:
    """The ControlNet or T2I-Adapter in a diffusers folder or in a single file, for a model.

    A single file has the names of CompVis or of diffusers; a training checkpoint may have the base model
    beside the ControlNet, which is ignored. unet: of the model, for a file that stores changes of its
    weights. Raises CheckpointError for a file that is no control, for missing, unexpected and misshaped
    tensors, and if it does not fit the model.
    """
    path = Path(path)
    if path.is_dir():
        config = path / "config.json"
        values = read_json(config)
        tensors = open_network(path, NETWORK_FILES, device, allow_pickle)
        if t2i_adapter.is_config(values):
            return t2i_adapter.from_config(path, values, tensors, base, dtype, device)
        spec = translated(config, control_files.spec_of_config, values)
        return opened(path, spec, tensors, base, dtype, device)
    tensors = open_weights(path, device, allow_pickle)
    shapes = tensors.shapes
    kind = control_files.kind_of(shapes)
    if kind == control_files.T2I_ADAPTER:
        return t2i_adapter.from_file(path, tensors, base, dtype, device)
    if kind is None:
        raise CheckpointError(f"{path} is not a ControlNet or a T2I-Adapter")
    if kind.refused:
        raise CheckpointError(f"{path} is {kind.name}, which {kind.refused}")
    tensors = own_tensors(tensors)
    if kind.derived:
        return opened_changes(path, kind.name, tensors, base, unet, dtype, device)
    with checked_structure(f"the ControlNet {path}"):
        spec = control_files.spec_of_tensors(tensors.shapes, path, base.unet)
    return opened(path, spec, tensors, base, dtype, device)


def own_tensors(tensors: Weights) -> Weights:
    """The ControlNet's tensors of a single file, which may have a prefix."""
    prefix = control_files.PREFIX
    own = {key.removeprefix(prefix): key for key in tensors.stored if key.startswith(prefix)}
    return tensors.renamed(own) if own else tensors


def opened(
    path: Path,
    spec: ControlNetSpec,
    tensors: Weights,
    base: ModelSpec,
    dtype: torch.dtype,
    device: torch.device | str,
) -> ControlNetControl:
    """A ControlNet with all its weights in a file."""
    if reason := misfit(spec, base):
        raise CheckpointError(f"the ControlNet {path} does not fit {base.name}: {reason}")
    with checked_structure(f"the ControlNet {path}"):
        part = part_of(spec, tensors)
    types = control_files.CONTROL_TYPES[: spec.control_types]
    kind = control_files.UNION_NET if types else control_files.CONTROL_NET
    network = loaded(path, part, dtype, device)
    # The tensors do not show it.
    return ControlNetControl(kind.name, spec, network, types, "inpaint" in path.stem.lower())


def opened_changes(
    path: Path,
    kind: str,
    tensors: Weights,
    base: ModelSpec,
    unet: UNet | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> ControlNetControl:
    """A ControlNet whose weights are changes of the model's. Raises CheckpointError without its UNet."""
    if unet is None:
        raise CheckpointError(f"{path} is {kind}: it needs the weights of its base model")
    latent = base.autoencoder.latent_channels
    encoder = replace(unet.spec, in_channels=latent, out_channels=latent, up_depths=(), noise_levels=0)
    with checked_structure(f"the ControlNet {path}"):
        hints = control_files.hint_shapes(tensors.shapes)
        spec = ControlNetSpec(encoder, hints[0][1], tuple(shape[0] for shape in hints))
    if reason := misfit(spec, base):
        raise CheckpointError(f"{path} does not fit {base.name}: {reason}")
    with checked_structure(f"the ControlNet {path}"):
        part = part_of(spec, derived(tensors, unet))
    network = loaded(path, part, dtype, device)
    return ControlNetControl(kind, spec, network, inpaints="inpaint" in path.stem.lower(), base=base.name)


def part_of(spec: ControlNetSpec, tensors: Weights) -> Part:
    """The network on the meta device, and its tensors under native names or under those of diffusers."""
    with shapes_only():
        network = ControlNet(spec)
    native = {key: key for key in network.state_dict()}
    names = diffusers_names(network) if control_files.DIFFUSERS_KEY in tensors.stored else native
    return Part(network, names, tensors)


def loaded(path: Path, part: Part, dtype: torch.dtype, device: torch.device | str) -> ControlNet:
    """The network with its weights. Raises CheckpointError for tensors that do not fit."""
    load_part(part, f"the ControlNet {path}", dtype, device)
    assert isinstance(part.network, ControlNet)
    return part.network


def diffusers_names(network: ControlNet) -> dict[str, str]:
    """Native parameter -> name in the layout of diffusers."""
    table = keymaps.control_net(network.spec)
    return {key: keymaps.rename(key, table) for key in network.state_dict()}


def save_control(network: ControlNet, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a ControlNet as a folder that diffusers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(control_files.config_of_spec(network.spec), indent=2) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    write_network(renamed(network, diffusers_names(network)), folder, NETWORK_FILES, dtype, shard=None)

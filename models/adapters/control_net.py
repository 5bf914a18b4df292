"""ControlNets: residuals for the UNet from control images (Zhang et al. 2023).

    open_control()      the network at a path
    Control.prepare()   once for each control image: its embedding
    Control.inputs()    at each step: the residuals of some rows
    weights(), scaled() how strongly each residual acts on a row
    is_active()         whether a control acts at a step

Where implementations differ, `diffusers` is followed: the ramp of the modes "prompt" and "control" is its
guess mode's, and a window contains the steps that lie in it completely. A1111's ramp is 0.825^(12 - i) for
residual i, and its controls act one step longer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.adapter_specs import ControlNetSpec
from models.checkpoint.meta import shapes_only
from models.checkpoint.parts import Part, assign, mismatches
from models.checkpoint.saving import renamed, write_network
from models.checkpoint.weights import NETWORK_FILES, Weights, open_network, open_weights, summarise_keys
from models.errors import CheckpointError
from models.formats import control_files, keymaps
from models.formats.config_files import read_json
from models.formats.diffusers_read import translated
from models.networks.adapter_inputs import AdapterInputs
from models.networks.control_net import ControlNet
from models.networks.unet import skip_widths
from models.spec import ModelSpec, UNetSpec

Mode = Literal["balanced", "prompt", "control"]
MODES: tuple[Mode, ...] = ("balanced", "prompt", "control")


class Rows(NamedTuple):
    """The inputs of R rows of a UNet call that a control network reads too."""

    x: Tensor  # (R, C_z, h, w), as the UNet gets it, without concat channels
    t: Tensor  # (R,)
    context: Tensor | None  # (R, L, C_ctx)
    pooled: Tensor | None  # (R, P)


@dataclass(frozen=True)
class Control:
    """A ControlNet that is ready to run.

    kind: for messages. types: kinds of control image, of which each use names one; () for a network for one.
    """

    kind: str
    spec: ControlNetSpec
    network: ControlNet
    types: tuple[str, ...] = ()

    every_step = True  # inputs() calls a network

    @property
    def strengths(self) -> int:
        """How many weights each row has: one for each residual, the last for the middle block's."""
        return len(skip_widths(self.spec.unet)) + 1

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(weight.nbytes for weight in self.network.parameters())

    @property
    def conditional_only(self) -> bool:
        """Whether it acts on conditional rows only, in every mode."""
        return self.spec.global_pool

    def misfit(self, model: ModelSpec) -> str | None:
        """Why it does not fit a model, as a clause; None if it does."""
        return misfit(self.spec, model)

    def fits(self, model: ModelSpec) -> bool:
        return self.misfit(model) is None

    def prepare(self, images: Tensor) -> tuple[Tensor, ...]:
        """Control images (B, 3, H, W) in [0, 1] of the output's size -> what inputs() needs, B rows of each.

        A network for one channel gets the mean of the three.
        """
        images = images.mean(1, keepdim=True) if self.spec.hint_channels == 1 else images
        return (self.network.embed_hint(images.to(self.network.dtype)),)

    def inputs(self, prepared: tuple[Tensor, ...], rows: Rows, types: Tensor | None = None) -> AdapterInputs:
        """The residuals of R rows, not yet scaled. types: (R,), indices in `types`, if there are any."""
        out = self.network(rows.x, rows.t, rows.context, rows.pooled, *prepared, types)
        residuals = AdapterInputs(out.skips, out.middle)
        return pooled(residuals) if self.spec.global_pool else residuals


def pooled(inputs: AdapterInputs) -> AdapterInputs:
    """Every residual replaced by its mean over all cells."""
    assert inputs.middle is not None
    skips, middle = (
        [x.mean((2, 3), keepdim=True).expand_as(x) for x in group]
        for group in (inputs.skips, (inputs.middle,))
    )
    return AdapterInputs(tuple(skips), middle[0])


def weights(control: Control, mode: Mode, scale: float, conditional: bool) -> tuple[float, ...]:
    """The weight of each residual on a row; () if the control does not act on it.

    "balanced": the scale. "prompt" and "control": a ramp of powers of ten from a tenth of the scale up to it,
    on all rows or on conditional rows only; `diffusers` calls the latter guess mode. conditional: whether the
    row has the prompt.
    """
    if not conditional and (mode == "control" or control.conditional_only):
        return ()
    count = control.strengths
    if mode == "balanced" or control.conditional_only:
        return (scale,) * count
    return tuple(scale * 10 ** (index / (count - 1) - 1) for index in range(count))


def scaled(inputs: AdapterInputs, strengths: Tensor) -> AdapterInputs:
    """Residuals or features of R rows times their weights (R, n), in the order of the inputs."""

    def times(x: Tensor, index: int) -> Tensor:
        return x * strengths[:, index, None, None, None].to(x.dtype)

    skips = tuple(times(x, index) for index, x in enumerate(inputs.skips))
    order = iter(range(len(skips), strengths.shape[1]))
    features = tuple(None if x is None else times(x, next(order)) for x in inputs.features)
    middle = None if inputs.middle is None else times(inputs.middle, next(order))
    return replace(inputs, skips=skips, features=features, middle=middle)


def is_active(step: int, steps: int, start: float, end: float) -> bool:
    """Whether a control with a window acts at a step of a run, counted from 0.

    start, end: parts of the run. A step acts if it lies in the window completely, as in `diffusers`.
    """
    return step / steps >= start and (step + 1) / steps <= end


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
) -> Control:
    """The ControlNet in a diffusers folder or in a single file, for a model.

    A single file has the names of CompVis or of diffusers; a training checkpoint may have the base model
    beside the ControlNet, which is ignored. Raises CheckpointError for a file that is no ControlNet, for
    missing, unexpected and misshaped tensors, and if it does not fit the model.
    """
    path = Path(path)
    if path.is_dir():
        config = path / "config.json"
        spec = translated(config, control_files.spec_of_config, read_json(config))
        tensors = open_network(path, NETWORK_FILES, device, allow_pickle)
    else:
        tensors = own_tensors(open_weights(path, device, allow_pickle), path)
        spec = spec_of_file(tensors, path, base.unet)
    if reason := misfit(spec, base):
        raise CheckpointError(f"the ControlNet {path} does not fit {base.name}: {reason}")
    with shapes_only():
        network = ControlNet(spec)
    part = Part(network, names(network, tensors), tensors)
    if problems := [summarise_keys(problem, keys) for problem, keys in mismatches(part).items()]:
        raise CheckpointError(f"the ControlNet {path}: {'; '.join(problems)}")
    assign(part, dtype)
    types = control_files.CONTROL_TYPES[: spec.control_types]
    kind = "ControlNet++" if types else "ControlNet"
    return Control(kind, spec, network.requires_grad_(False).eval().to(device), types)


def own_tensors(tensors: Weights, path: Path) -> Weights:
    """The ControlNet's tensors of a single file. Raises CheckpointError if there is none."""
    shapes = {key: stored.shape for key, stored in tensors.stored.items()}
    if not control_files.is_control_net(shapes):
        raise CheckpointError(f"{path} is not a ControlNet")
    prefix = control_files.PREFIX
    own = {key.removeprefix(prefix): key for key in shapes if key.startswith(prefix)}
    return tensors.renamed(own) if own else tensors


def spec_of_file(tensors: Weights, path: Path, base: UNetSpec | None) -> ControlNetSpec:
    """Raises CheckpointError for tensors that do not form a ControlNet."""
    shapes = {key: stored.shape for key, stored in tensors.stored.items()}
    try:
        return control_files.spec_of_tensors(shapes, path, base)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"the ControlNet {path} has an unsupported structure: {error}") from error


def names(network: ControlNet, tensors: Weights) -> dict[str, str]:
    """Native parameter -> name in the file."""
    if control_files.DIFFUSERS_KEY in tensors.stored:
        return diffusers_names(network)
    return {key: key for key in network.state_dict()}


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

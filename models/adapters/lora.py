"""LoRA files (Hu et al. 2021) of every kind in lora_kinds, merged into a copy of a model.

A file names modules in kohya's style (lora_unet_..., lora_te_...) or in that of PEFT and diffusers (unet...,
text_encoder..., base_model.model...), each by diffusers' or by CompVis's names. A weight that is changed is
copied, and the changes are added once, in float32; all other weights are shared with the base model, which
stays as it is. Each change is that of the base model's weight, so that the order of LoRAs has no effect.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.adapters.lora_changes import Change, Problems, match, read_change
from models.adapters.lora_kinds import dora_delta, magnitude_of
from models.adapters.lora_targets import Layer, Target, find_layers
from models.adapters.textual_inversion import Embedding, add_embeddings, read_bundled
from models.checkpoint.weights import MAX_KEY_CHARS, Weights, map_weights, summarise_keys
from models.errors import CheckpointError
from models.formats import few_step
from models.formats.adapters import read_lora_scales
from models.formats.lora_keys import BUNDLED_EMBEDDING, split_key, unsupported_kind
from models.formats.safetensors import Header
from models.formats.single_file import read_header
from models.latent_diffusion import LatentDiffusion
from models.networks.unet import stack_layers_like
from models.spec import FewStep, ModelSpec

log = logging.getLogger(__name__)

MAX_LISTED_MODULES = 3  # in a warning
GENERIC_STEMS = ("adapter_model", "pytorch_lora_weights")  # file names that say nothing; the folder's counts

Module = TypeVar("Module", bound="nn.Module | None")


@dataclass(frozen=True)
class Lora:
    """A file's changes of one model, which are read when they are merged.

    embeddings: words that the file adds to prompts. vocabulary: size of the model's token embeddings, which
    embeddings copy; 0 without embeddings. ignored: names of tensors without a counterpart in the model.
    few_step: usual settings, if the file's names say that it was distilled to few steps.
    """

    changes: tuple[Change, ...]
    weights: Weights
    embeddings: tuple[Embedding, ...] = ()
    vocabulary: int = 0
    ignored: tuple[str, ...] = ()
    few_step: FewStep | None = None

    def delta(self, change: Change, weight: Tensor) -> Tensor:
        """The tensor to add to a float32 weight, in its shape, on the device that the file was opened for."""
        parts = {part: self.weights.read(key).float() for part, key in change.keys.items()}
        weight = weight.to(next(iter(parts.values())).device)
        delta = change.scale * change.kind.delta(parts, weight)
        magnitude = magnitude_of(parts, weight)
        return delta if magnitude is None else dora_delta(weight, delta, magnitude)


def apply(model: LatentDiffusion, loras: Sequence[tuple[Lora, float, float]]) -> LatentDiffusion:
    """The model with LoRAs, each with its weights for the UNet and for the text encoders.

    Only changed weights are copied; the base stays as it is.
    """
    changes: dict[Target, list[tuple[Lora, Change, float]]] = defaultdict(list)
    for lora, unet_weight, text_weight in loras:
        for change in lora.changes:
            if weight := unet_weight if change.target.network == "unet" else text_weight:
                changes[change.target].append((lora, change, weight))
    merged: dict[str, dict[int, nn.Parameter]] = {"unet": {}, "conditioner": {}}
    for target, of_target in changes.items():
        network = model.unet if target.network == "unet" else model.conditioner
        assert network is not None
        base = network.get_parameter(target.parameter)
        merged[target.network][id(base)] = changed(base, of_target)
    unet = sharing(model.unet, merged["unet"])
    if unet is not None and model.unet is not None:
        stack_layers_like(unet, model.unet)
    embeddings = [embedding for lora, *_ in loras for embedding in lora.embeddings]
    conditioner = sharing(model.conditioner, merged["conditioner"], always=bool(embeddings))
    return add_embeddings(LatentDiffusion(model.spec, unet, model.autoencoder, conditioner), embeddings)


@torch.no_grad()
def changed(base: nn.Parameter, changes: Sequence[tuple[Lora, Change, float]]) -> nn.Parameter:
    """A weight with its changes, rounded once, in the type and memory layout of the base."""
    original = base.float()
    total = reduce(torch.add, (weight * lora.delta(change, original) for lora, change, weight in changes))
    return nn.Parameter(torch.empty_like(base).copy_(original + total.to(base.device)), requires_grad=False)


def sharing(network: Module, merged: Mapping[int, nn.Parameter], always: bool = False) -> Module:
    """A copy of a network with some parameters replaced (id -> new parameter) and all others shared.

    Without replaced parameters the network itself is returned, unless `always`.
    """
    if network is None or not (merged or always):
        return network
    kept: dict[int, object] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    tokenizers = (getattr(module, "tokenizer", None) for module in network.modules())
    kept |= {id(tokenizer): tokenizer for tokenizer in tokenizers if tokenizer is not None}
    return deepcopy(network, kept | dict(merged))


def changed_bytes(loras: Sequence[Lora], dtype: torch.dtype) -> int:
    """Bytes that merging LoRAs takes: the size of the weights that they change."""
    targets = {change.target for lora in loras for change in lora.changes}
    vocabulary = max((lora.vocabulary for lora in loras), default=0)
    return dtype.itemsize * (vocabulary + sum(math.prod(target.shape) for target in targets))


def open_loras(
    files: Mapping[str, Path],
    specs: Mapping[str, ModelSpec],
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> dict[str, dict[str, Lora]]:
    """Model -> name -> LoRA, for all LoRAs that fit the model. files: name -> path.

    A LoRA fits a model that has at least one of its modules and in which every such module has the right
    shape. Raises CheckpointError for a LoRA that fits no model, naming its problems with the closest one.
    """
    layers = {model: find_layers(spec) for model, spec in specs.items()} if files else {}
    fitting: dict[str, dict[str, Lora]] = {model: {} for model in specs}
    for name, file in files.items():
        opened = OpenedLora(name, file, device, allow_pickle)
        problems = {}
        for model, spec in specs.items():
            lora, problems[model] = opened.fit(layers[model], spec)
            if not problems[model]:
                fitting[model][name] = lora
                if text := warning(name, lora):
                    log.warning("model %s: %s", model, text)
        if all(problems.values()):
            raise CheckpointError(f"LoRA {name} ({file}) {closest(problems)}")
    return fitting


def few_step_of(file: Path, header: Header) -> tuple[FewStep, str] | None:
    """The usual settings of a LoRA for few steps, and what says so; None for other LoRAs."""
    name = file.absolute().parent.name if file.stem in GENERIC_STEMS else file.stem
    return few_step.of_names([*few_step.header_names(header.metadata), ("the file's name", name)])


class OpenedLora:
    """A LoRA file whose header was read. Raises CheckpointError for a file that is no LoRA."""

    def __init__(
        self, name: str, file: Path, device: torch.device | str = "cpu", allow_pickle: bool = False
    ) -> None:
        header = read_header(file, allow_pickle)
        self.weights, self.scales = map_weights(file, header, device), read_lora_scales(file, header)
        check_supported(name, file, self.weights)
        self.embeddings, usual = read_bundled(name, file, self.weights), few_step_of(file, header)
        self.few_step = usual[0] if usual else None

    def match(self, layers: Mapping[str, Layer], spec: ModelSpec) -> tuple[tuple[str, ...], Problems]:
        """The tensors that a model ignores, and the problems with it; reads no weights of the changes."""
        found = match(self.weights, layers)
        return (*found.ignored, *self._ignored_embeddings(spec)), found.problems

    def fit(self, layers: Mapping[str, Layer], spec: ModelSpec) -> tuple[Lora, Problems]:
        """The changes of a model, and the problems with it. Raises CheckpointError for a non-finite scale."""
        found = match(self.weights, layers)
        changes = tuple(
            read_change(module, parts, target, self.weights, self.scales)
            for target, (module, parts) in found.parts.items()
        )
        fitting = tuple(embedding for embedding in self.embeddings if embedding.fits(spec))
        vocabulary = sum(text.vocabulary * text.width for text in spec.texts) if fitting else 0
        ignored = (*found.ignored, *self._ignored_embeddings(spec))
        return Lora(changes, self.weights, fitting, vocabulary, ignored, self.few_step), found.problems

    def _ignored_embeddings(self, spec: ModelSpec) -> Iterator[str]:
        return (BUNDLED_EMBEDDING + each.name for each in self.embeddings if not each.fits(spec))


def closest(problems: Mapping[str, Problems]) -> str:
    """Why a LoRA fits no model: its problems with the model with which it has the fewest."""
    if not problems:
        return "does not fit: there is no model"
    model = min(problems, key=lambda model: sum(map(len, problems[model].values())))
    found = "; ".join(summarise_keys(problem, keys) for problem, keys in problems[model].items())
    return f"does not fit {model}: {found}"


def warning(name: str, lora: Lora) -> str:
    """A warning that names the modules of a LoRA that the model ignores; empty if there are none."""
    return ignored_warning(name, lora.ignored)


def ignored_warning(name: str, keys: Sequence[str]) -> str:
    """warning() for the names of the ignored tensors."""
    modules = sorted({split_key(key)[0] or key for key in keys})
    if not modules:
        return ""
    more = f" and {len(modules) - MAX_LISTED_MODULES} more" if len(modules) > MAX_LISTED_MODULES else ""
    listed = ", ".join(module[:MAX_KEY_CHARS] for module in modules[:MAX_LISTED_MODULES])
    return f"LoRA {name}: modules that this model does not have are ignored: {listed}{more}"


def check_supported(name: str, file: Path, weights: Weights) -> None:
    """Raise CheckpointError for a file without tensors, or with changes that cannot be merged."""
    if not weights.stored:
        raise CheckpointError(f"LoRA {name} ({file}) has no tensors")
    if found := unsupported_kind(list(weights.stored)):
        kind, key = found
        raise CheckpointError(f"LoRA {name} ({file}) is of the kind {kind}, which is not supported: {key}")

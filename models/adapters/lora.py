"""Low-rank changes of weights (LoRA, Hu et al. 2021): read strictly, merged into a copy of the model.

A file names modules in kohya's style (lora_unet_..., lora_te_...) or in that of PEFT and diffusers (unet...,
text_encoder..., base_model.model...), each by diffusers' or by CompVis's names. A weight that is changed is
copied, and the changes are added once, in float32; all other weights are shared with the base model, which
stays as it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.adapters.lora_targets import Target, find_targets
from models.checkpoint.weights import Weights, map_weights, summarise_keys
from models.errors import CheckpointError
from models.formats.adapters import LoraScale, read_lora_scales
from models.formats.safetensors import FLOATS
from models.formats.single_file import read_header
from models.latent_diffusion import LatentDiffusion
from models.spec import ModelSpec

DOWN, UP, MID, ALPHA = "down", "up", "mid", "alpha"
SUFFIXES = {  # end of a key -> which part of a module's change the tensor is
    ".lora_down.weight": DOWN,
    ".lora_up.weight": UP,
    ".lora_mid.weight": MID,
    ".alpha": ALPHA,
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_A.default.weight": DOWN,
    ".lora_B.default.weight": UP,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
}
UNSUPPORTED = {  # part of a key -> the kind of change
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".oft_": "OFT",
    ".on_input": "IA3",
    ".a1.weight": "GLoRA",
    ".w_norm": "norm changes",
    ".diff": "full differences of weights",
    ".lora_embedding_": "LoRA of embeddings",
    ".lora_B.bias": "LoRA with biases",
    "bundle_emb.": "LoRA with embeddings of its own",
}
PEFT_PREFIX = "base_model.model."  # before PEFT's names of modules

Problems = dict[str, list[str]]  # kind of problem -> keys
Module = TypeVar("Module", bound="nn.Module | None")


@dataclass(frozen=True)
class Change:
    """scale * up @ down for one weight, or with `mid` in between (LyCORIS, convolutions). Names in a file."""

    target: Target
    down: str
    up: str
    mid: str | None
    scale: float


@dataclass(frozen=True)
class Lora:
    """A file's changes of one model's weights; they are read when they are merged."""

    changes: tuple[Change, ...]
    weights: Weights

    def delta(self, change: Change) -> Tensor:
        """What to add to the target, in its shape, float32, on the device that the file was opened for."""
        read = self.weights.read
        up, down = (read(name).float().flatten(1) for name in (change.up, change.down))  # (out, r), (r, in..)
        if change.mid:
            product = torch.einsum("oa,abhw,bi->oihw", up, read(change.mid).float(), down)
        else:
            product = up @ down
        return change.scale * product.reshape(change.target.shape)


def apply(bundle: LatentDiffusion, loras: Sequence[tuple[Lora, float]]) -> LatentDiffusion:
    """The model with LoRAs and their weights. Only changed weights are copied; the base stays as it is."""
    changes: dict[Target, list[tuple[Lora, Change, float]]] = defaultdict(list)
    for lora, weight in loras:
        for change in lora.changes:
            changes[change.target].append((lora, change, weight))
    merged: dict[str, dict[int, nn.Parameter]] = {"unet": {}, "conditioner": {}}
    for target, of_target in changes.items():
        network = bundle.unet if target.network == "unet" else bundle.conditioner
        assert network is not None
        base = network.get_parameter(target.parameter)
        merged[target.network][id(base)] = changed(base, of_target)
    unet, conditioner = (
        sharing(bundle.unet, merged["unet"]),
        sharing(bundle.conditioner, merged["conditioner"]),
    )
    return LatentDiffusion(bundle.spec, unet, bundle.autoencoder, conditioner)


@torch.no_grad()
def changed(base: nn.Parameter, changes: Sequence[tuple[Lora, Change, float]]) -> nn.Parameter:
    """A weight with its changes, rounded once, in the type and memory layout of the base."""
    deltas = (weight * lora.delta(change) for lora, change, weight in changes)
    total = reduce(torch.add, deltas)
    return nn.Parameter(
        torch.empty_like(base).copy_(base.float() + total.to(base.device)), requires_grad=False
    )


def sharing(network: Module, merged: Mapping[int, nn.Parameter]) -> Module:
    """A copy of a network that has other parameters in place of some, by id, and shares the rest."""
    if network is None or not merged:
        return network
    kept: dict[int, object] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    tokenizers = (getattr(module, "tokenizer", None) for module in network.modules())
    kept |= {id(tokenizer): tokenizer for tokenizer in tokenizers if tokenizer is not None}
    return deepcopy(network, kept | dict(merged))


def changed_bytes(loras: Sequence[Lora], dtype: torch.dtype) -> int:
    """Memory that merging these takes: the size of the weights that they change."""
    targets = {change.target for lora in loras for change in lora.changes}
    return dtype.itemsize * sum(math.prod(target.shape) for target in targets)


def open_loras(
    files: Mapping[str, Path],
    specs: Mapping[str, ModelSpec],
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> dict[str, dict[str, Lora]]:
    """Model -> name -> LoRA, of those that fit it; files by name.

    Raises CheckpointError for one that fits no model, with what does not fit the model closest to it.
    """
    targets = {model: find_targets(spec) for model, spec in specs.items()} if files else {}
    fitting: dict[str, dict[str, Lora]] = {model: {} for model in specs}
    for name, file in files.items():
        header = read_header(file, allow_pickle)
        weights, scales = map_weights(file, header, device), read_lora_scales(file, header)
        check_supported(name, file, weights)
        problems = {}
        for model in specs:
            lora, problems[model] = fit(weights, scales, targets[model])
            if not problems[model]:
                fitting[model][name] = lora
        if all(problems.values()):
            model = min(problems, key=lambda model: sum(map(len, problems[model].values())))
            found = "; ".join(summarise_keys(problem, keys) for problem, keys in problems[model].items())
            raise CheckpointError(f"LoRA {name} ({file}) does not fit {model}: {found}")
    return fitting


def check_supported(name: str, file: Path, weights: Weights) -> None:
    """Raise CheckpointError for a file without tensors, or with changes that are not plain LoRA."""
    if not weights.stored:
        raise CheckpointError(f"LoRA {name} ({file}) has no tensors")
    for part, kind in UNSUPPORTED.items():
        if keys := [key for key in weights.stored if part in key]:
            raise CheckpointError(
                f"LoRA {name} ({file}) is of the kind {kind}, which is not supported: {keys[0]}"
            )


def fit(
    weights: Weights, scales: Mapping[str, LoraScale], targets: Mapping[str, Target]
) -> tuple[Lora, Problems]:
    """A file's changes of these targets, and what is wrong with them."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)  # module -> part -> key
    problems: Problems = defaultdict(list)
    for key in weights.stored:
        module, part = split_key(key)
        problem = "unknown" if module not in targets else "repeated" if part in modules[module] else ""
        if problem:
            problems[problem].append(key)
        else:
            modules[module][part] = key
    changes: dict[Target, Change] = {}
    for module, keys in modules.items():
        if not keys:
            continue
        target = targets[module]
        wrong = module_problems(keys, target, weights)
        if target in changes:  # under another name
            wrong = {"repeated": list(keys.values())}
        for problem, names in wrong.items():
            problems[problem] += names
        if not wrong:
            scale = module_scale(module, keys, weights, scales)
            changes[target] = Change(target, keys[DOWN], keys[UP], keys.get(MID), scale)
    return Lora(tuple(changes.values()), weights), dict(problems)


def split_key(key: str) -> tuple[str, str]:
    """The module of a tensor, without PEFT's prefix, and which part of the change the tensor is."""
    for suffix, part in SUFFIXES.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix).replace(PEFT_PREFIX, ""), part
    return "", ""


def module_problems(keys: Mapping[str, str], target: Target, weights: Weights) -> Problems:
    """What is wrong with a module's tensors; keys: part -> key."""
    if not {DOWN, UP} <= keys.keys():
        return {"incomplete": list(keys.values())}
    entries = {part: weights.stored[key] for part, key in keys.items()}
    mistyped = [f"{keys[part]} {entry.dtype}" for part, entry in entries.items() if entry.dtype not in FLOATS]
    if mistyped:
        return {"mistyped": mistyped}
    shapes = {part: trimmed(entry.shape) for part, entry in entries.items()}
    rank, outer = (
        shapes[part][axis] if len(shapes[part]) > axis else 0 for part, axis in ((DOWN, 0), (UP, 1))
    )
    out, into, *kernel = trimmed(target.shape)
    expected: dict[str, tuple[int, ...]] = {DOWN: (rank, into, *kernel), UP: (out, outer)}
    if MID in keys:
        expected |= {DOWN: (rank, into), MID: trimmed((outer, rank, *kernel))}
    elif rank != outer:
        expected[UP] = (out, rank)
    if ALPHA in keys:
        expected[ALPHA] = ()
        shapes[ALPHA] = () if entries[ALPHA].count == 1 else shapes[ALPHA]
    wrong = [part for part in keys if shapes[part] != expected[part] or not entries[part].count]
    if not wrong:
        return {}
    return {"misshaped": [f"{keys[p]} {entries[p].shape} (expected {expected[p]})" for p in wrong]}


def trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """Without trailing axes of 1 after the second axis: a 1x1 convolution is a matrix."""
    sides = list(shape)
    while len(sides) > 2 and sides[-1] == 1:
        sides.pop()
    return tuple(sides)


def module_scale(
    module: str, keys: Mapping[str, str], weights: Weights, scales: Mapping[str, LoraScale]
) -> float:
    """alpha / rank of a module's change; 1 if nothing gives alpha. Raises CheckpointError if not finite."""
    rank = weights.stored[keys[DOWN]].shape[0]
    network, _, inner = module.partition(".")
    if ALPHA in keys:
        scale = weights.read(keys[ALPHA]).float().item() / rank
    elif network in scales:
        scale = scales[network].scale(inner, rank)
    else:
        scale = scales.get("", LoraScale()).scale(module, rank)
    if not math.isfinite(scale):
        raise CheckpointError(f"{keys.get(ALPHA, module)}: the alpha of a LoRA must be finite")
    return scale

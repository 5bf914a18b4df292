"""Low-rank changes of weights (LoRA, Hu et al. 2021): read strictly, merged into networks beside the base.

A file names modules in kohya's style (lora_unet_..., lora_te_...) or in that of PEFT and diffusers (unet...,
text_encoder..., base_model.model...), each by diffusers' names or by CompVis's. What it changes is copied
with the change added once, in float32; all else is shared with the base, which is never touched.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.checkpoint.folder import Weights, listed, networks_of, open_weights, translated
from models.checkpoint.meta import shapes_only
from models.conditioning.conditioner import Conditioner, TextConditioner
from models.errors import CheckpointError
from models.formats import keymaps
from models.formats.config_files import read_json
from models.formats.safetensors import FLOATS
from models.latent_diffusion import LatentDiffusion
from models.networks.unet import UNet
from models.spec import ModelSpec

DOWN, UP, MID, ALPHA = "down", "up", "mid", "alpha"
PARTS = {  # how a key ends -> what it holds of its module
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
OTHERS = {  # part of a key -> the kind of change, which is none that can be merged here
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
PEFT = "base_model.model."  # what PEFT puts before the names of a model's modules
ADAPTER = "adapter_config.json"  # PEFT's configuration beside its weights
METADATA = "lora_adapter_metadata"  # the same inside a file of diffusers
NETWORKS = ("unet", "text_encoder", "text_encoder_2")  # as PEFT and diffusers prefix them
KOHYA_TEXTS = (("lora_te_", "lora_te1_"), ("lora_te2_",))  # of each text encoder


class Target(NamedTuple):
    """A weight that can be changed. network: unet or conditioner, of LatentDiffusion."""

    network: str
    parameter: str
    shape: tuple[int, ...]


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
        """Of the target's shape, float32, where the file was opened for."""
        read = self.weights.read
        up, down = (read(name).float().flatten(1) for name in (change.up, change.down))  # (out, r), (r, in..)
        if change.mid:
            both = torch.einsum("oa,abhw,bi->oihw", up, read(change.mid).float(), down)
        else:
            both = up @ down
        return change.scale * both.reshape(change.target.shape)


@dataclass(frozen=True)
class Told:
    """What a file says of its scale beside its tensors, as PEFT does. alpha: None for the rank itself."""

    alpha: float | None = None
    patterns: Mapping[str, float] | None = None  # the end of a module's name, a regular expression -> its own
    rooted: bool = False  # alpha is divided by the rank's root

    def scale(self, module: str, rank: int) -> float:
        """Of the change of a module that has no alpha of its own in the file."""
        matching = (a for end, a in (self.patterns or {}).items() if re.fullmatch(rf"(.*\.)?({end})", module))
        alpha = next(matching, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rooted else rank)


def apply(bundle: LatentDiffusion, loras: Sequence[tuple[Lora, float]]) -> LatentDiffusion:
    """The model with changes and their weights. Only what they change is copied; the base stays as it is."""
    parts: dict[Target, list[tuple[Lora, Change, float]]] = defaultdict(list)
    for lora, weight in loras:
        for change in lora.changes:
            parts[change.target].append((lora, change, weight))
    networks = {"unet": bundle.unet, "conditioner": bundle.conditioner}
    merged: dict[str, dict[int, nn.Parameter]] = {name: {} for name in networks}
    for target, changes in parts.items():
        base = networks[target.network].get_parameter(target.parameter)
        merged[target.network][id(base)] = changed(base, changes)
    unet, conditioner = (sharing(networks[name], merged[name]) for name in networks)
    return LatentDiffusion(bundle.spec, unet, bundle.autoencoder, conditioner)


@torch.no_grad()
def changed(base: nn.Parameter, changes: Sequence[tuple[Lora, Change, float]]) -> nn.Parameter:
    """A weight with its changes, rounded once: in its type, and laid out in memory as it is."""
    total = sum(weight * lora.delta(change) for lora, change, weight in changes)
    return nn.Parameter(
        torch.empty_like(base).copy_(base.float() + total.to(base.device)), requires_grad=False
    )


def sharing(network: nn.Module | None, merged: Mapping[int, nn.Parameter]) -> nn.Module | None:
    """A copy of a network that has other parameters in the place of some, by id, and shares the rest."""
    if network is None or not merged:
        return network
    kept = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    tokenizers = (getattr(module, "tokenizer", None) for module in network.modules())
    kept |= {id(tokenizer): tokenizer for tokenizer in tokenizers if tokenizer is not None}
    return deepcopy(network, kept | dict(merged))


def changed_bytes(loras: Sequence[Lora], dtype: torch.dtype) -> int:
    """What these take when they are merged: the weights of a model that they change."""
    targets = {change.target for lora in loras for change in lora.changes}
    return dtype.itemsize * sum(math.prod(target.shape) for target in targets)


def open_loras(
    files: Mapping[str, Path],
    specs: Mapping[str, ModelSpec],
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> dict[str, dict[str, Lora]]:
    """Model -> name -> LoRA, of those that fit it; files by name.

    Raises CheckpointError for one that fits no model: with what does not fit in the one that it fits best.
    """
    targets = {model: targets_of(spec) for model, spec in specs.items()} if files else {}
    fitting: dict[str, dict[str, Lora]] = {model: {} for model in specs}
    for name, file in files.items():
        weights, told = open_weights(file, device, allow_pickle), told_of(file)
        refuse_others(name, file, weights)
        faults = {}
        for model in specs:
            lora, faults[model] = fit(weights, told, targets[model])
            if not faults[model]:
                fitting[model][name] = lora
        if all(faults.values()):
            model = min(faults, key=lambda model: sum(map(len, faults[model].values())))
            wrong = "; ".join(listed(what, keys) for what, keys in faults[model].items())
            raise CheckpointError(f"LoRA {name} ({file}) does not fit {model}: {wrong}")
    return fitting


def refuse_others(name: str, file: Path, weights: Weights) -> None:
    """Raise CheckpointError for a file without tensors, or with changes that are no plain LoRA."""
    if not weights.stored:
        raise CheckpointError(f"LoRA {name} ({file}) holds no tensors")
    for mark, kind in OTHERS.items():
        if keys := [key for key in weights.stored if mark in key]:
            raise CheckpointError(
                f"LoRA {name} ({file}) is of a kind that cannot be applied, {kind}: {keys[0]}"
            )


def fit(weights: Weights, told: Mapping[str, Told], targets: Mapping[str, Target]) -> tuple[Lora, dict]:
    """A file's changes of these targets, and what is wrong with them: kind of fault -> keys."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)  # module -> part -> key
    faults: dict[str, list[str]] = defaultdict(list)
    for key in weights.stored:
        module, part = split(key)
        kind = "unknown" if module not in targets else "repeated" if part in modules[module] else ""
        if kind:
            faults[kind].append(key)
        else:
            modules[module][part] = key
    changes: dict[Target, Change] = {}
    for module, keys in modules.items():
        if not keys:
            continue
        target = targets[module]
        wrong = faults_of(keys, target, weights)
        if target in changes:  # by another name
            wrong = {"repeated": list(keys.values())}
        for what, names in wrong.items():
            faults[what] += names
        if not wrong:
            scale = scale_of(module, keys, weights, told)
            changes[target] = Change(target, keys[DOWN], keys[UP], keys.get(MID), scale)
    return Lora(tuple(changes.values()), weights), {what: keys for what, keys in faults.items() if keys}


def split(key: str) -> tuple[str, str]:
    """A key's module, without what PEFT puts before it, and which part of its change the key holds."""
    for end, part in PARTS.items():
        if key.endswith(end):
            return key.removesuffix(end).replace(PEFT, ""), part
    return "", ""


def faults_of(keys: Mapping[str, str], target: Target, weights: Weights) -> dict[str, list[str]]:
    """What is wrong with a module's tensors: kind of fault -> keys."""
    if not {DOWN, UP} <= keys.keys():
        return {"incomplete": list(keys.values())}
    entries = {part: weights.stored[key] for part, key in keys.items()}
    mistyped = [f"{keys[part]} {entry.dtype}" for part, entry in entries.items() if entry.dtype not in FLOATS]
    if mistyped:
        return {"mistyped": mistyped}
    shapes = {part: bare(entry.shape) for part, entry in entries.items()}
    rank, outer = (
        shapes[part][axis] if len(shapes[part]) > axis else 0 for part, axis in ((DOWN, 0), (UP, 1))
    )
    out, into, *kernel = bare(target.shape)
    expected = {DOWN: (rank, into, *kernel), UP: (out, outer)}
    if MID in keys:
        expected |= {DOWN: (rank, into), MID: bare((outer, rank, *kernel))}
    elif rank != outer:
        expected[UP] = (out, rank)
    if ALPHA in keys:
        expected[ALPHA] = ()
        shapes[ALPHA] = () if entries[ALPHA].count == 1 else shapes[ALPHA]
    odd = [part for part in keys if shapes[part] != expected[part] or not entries[part].count]
    return (
        {"misshaped": [f"{keys[p]} {entries[p].shape} (expected {expected[p]})" for p in odd]} if odd else {}
    )


def bare(shape: Sequence[int]) -> tuple[int, ...]:
    """Without the axes of 1 after the second: a 1x1 convolution is a matrix."""
    shape = list(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def scale_of(module: str, keys: Mapping[str, str], weights: Weights, told: Mapping[str, Told]) -> float:
    """alpha / rank of a module's change; 1 where nothing says alpha. Raises CheckpointError if not finite."""
    rank = weights.stored[keys[DOWN]].shape[0]
    if ALPHA in keys:
        scale = weights.read(keys[ALPHA]).float().item() / rank
    else:
        network, _, rest = module.partition(".")
        scale = (
            told[network].scale(rest, rank) if network in told else told.get("", Told()).scale(module, rank)
        )
    if not math.isfinite(scale):
        raise CheckpointError(f"{keys.get(ALPHA, module)}: the alpha of a LoRA must be finite")
    return scale


def told_of(file: Path) -> dict[str, Told]:
    """What is said beside the tensors, by network; "" for the file's one network. Raises CheckpointError."""
    if file.suffix != ".safetensors":
        return {}
    with translated(file):
        metadata = safe_open(file, framework="pt").metadata() or {}
        flat = json.loads(metadata.get(METADATA, "{}"))
    if not isinstance(flat, dict):
        raise CheckpointError(f"{file}: {METADATA} in its header must hold an object")
    beside = file.parent / ADAPTER
    found = {"": read_json(beside)} if beside.is_file() and file.name == "adapter_model.safetensors" else {}
    for network in NETWORKS:
        prefix = network + "."
        own = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
        found |= {network: own} if own else {}
    return {network: told(config, file) for network, config in found.items()}


def told(config: Mapping[str, Any], file: Path) -> Told:
    """Of PEFT's configuration of one network. Raises CheckpointError for kinds that cannot be merged."""
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA" or config.get("use_dora"):
        name = "DoRA" if config.get("use_dora") else kind
        raise CheckpointError(f"{file} is of a kind that cannot be applied, {name}")
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    numbers = isinstance(patterns, dict) and (*patterns.values(), alpha or 0)
    if not numbers or not all(isinstance(value, int | float) for value in numbers):
        raise CheckpointError(f"{file}: lora_alpha and alpha_pattern of its configuration must be numbers")
    try:
        for end in patterns:
            re.compile(end)
    except re.error as error:
        raise CheckpointError(f"{file}: alpha_pattern has {end!r}, which is no pattern: {error}") from error
    return Told(alpha, patterns, bool(config.get("use_rslora")))


def targets_of(spec: ModelSpec) -> dict[str, Target]:
    """Every name that files call a model's weights by -> the weight."""
    with shapes_only():
        networks = networks_of(spec)
    targets = {}
    for names, target in (*unet_targets(networks.unet), *text_targets(networks.conditioner)):
        targets |= dict.fromkeys(names, target)
    return targets


def unet_targets(unet: UNet) -> Iterator[tuple[set[str], Target]]:
    """Names of each weight of a UNet, by diffusers and by CompVis, and the weight."""
    table = keymaps.unet(unet.spec)
    for native, shape in leaves(unet):
        names = {native}
        if any(native == module or native.startswith(module + ".") for module in table):
            names.add(keymaps.rename(native, table))
        both = names | {f"unet.{name}" for name in names}
        yield both | {kohya("lora_unet_", name) for name in names}, Target("unet", f"{native}.weight", shape)


def text_targets(conditioner: Conditioner | None) -> Iterator[tuple[set[str], Target]]:
    """Names of each weight of CLIP's text encoders, and the weight."""
    if not isinstance(conditioner, TextConditioner):
        return
    for index, encoder in enumerate(conditioner.encoders):
        for native, shape in leaves(encoder):
            inner = native.removeprefix("transformer.")
            names = {inner, keymaps.TEXT_PREFIX + inner}
            both = {f"{NETWORKS[1 + index]}.{name}" for name in names}
            both |= {kohya(prefix, name) for prefix in KOHYA_TEXTS[index] for name in names}
            own = names if index == 0 else set()
            yield both | own, Target("conditioner", f"encoders.{index}.{native}.weight", shape)


def leaves(network: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and weights' shapes of a network's linear layers and convolutions."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            yield name, tuple(module.weight.shape)


def kohya(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_")

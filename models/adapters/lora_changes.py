"""Which weights of a model a LoRA file changes, by the names and shapes of its tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from models.adapters.lora_kinds import (
    DORA,
    FULL,
    LORA,
    MAGNITUDE,
    NUMBERS,
    Kind,
    kinds_of,
    magnitude_shape,
    trimmed,
)
from models.adapters.lora_targets import Layer, Target
from models.checkpoint.weights import Weights
from models.errors import CheckpointError
from models.formats.adapters import LoraScale
from models.formats.lora_keys import BUNDLED_EMBEDDING, split_key
from models.formats.safetensors import FLOATS

WEIGHT_TYPES = (*FLOATS, "float8_e4m3fn", "float8_e5m2")
NUMBER_TYPES = (*WEIGHT_TYPES, "int64", "int32", "int16", "int8", "uint8")  # of alpha
ALPHA, SCALAR = NUMBERS
FULL_PART, BIAS = "diff", "diff_b"

Problems = dict[str, list[str]]  # kind of problem -> keys


@dataclass(frozen=True)
class Change:
    """The change of one weight.

    keys: part -> name in the file. scale: factor of the whole change, before DoRA.
    """

    target: Target
    kind: Kind
    keys: Mapping[str, str]
    rank: int | None
    scale: float


class Matched(NamedTuple):
    """What a file changes. parts: weight -> module, and part -> name in the file."""

    parts: dict[Target, tuple[str, dict[str, str]]]
    ignored: tuple[str, ...]
    problems: Problems


def match(weights: Weights, layers: Mapping[str, Layer]) -> Matched:
    """Which of these layers a file changes, by the names and shapes of its tensors."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)  # module -> part -> key
    problems: Problems = defaultdict(list)
    ignored = []
    for key in weights.stored:
        module, part = split_key(key)
        if key.startswith(BUNDLED_EMBEDDING):
            continue
        if module not in layers:
            ignored.append(key)
        elif part in modules[module]:
            problems["repeated"].append(key)
        else:
            modules[module][part] = key
    matched: dict[Target, tuple[str, dict[str, str]]] = {}
    for module, keys in modules.items():
        layer, bias = layers[module], keys.pop(BIAS, None)
        wanted = [(layer.weight, keys)] if keys.keys() - NUMBERS or not bias else []
        if bias and layer.bias:
            wanted.append((layer.bias, {FULL_PART: bias}))
        elif bias:
            ignored.append(bias)
        for target, parts in wanted:
            wrong = part_problems(parts, target, weights)
            if target in matched:  # under another name
                wrong = {"repeated": list(parts.values())}
            for problem, names in wrong.items():
                problems[problem] += names
            if not wrong:
                matched[target] = (module, parts)
    if not matched and not problems:
        problems["unknown"] += ignored
    return Matched(matched, tuple(ignored), dict(problems))


def part_problems(keys: Mapping[str, str], target: Target, weights: Weights) -> Problems:
    """Problems with the tensors that change one weight. keys: part -> name in the file."""
    names, kinds = list(keys.values()), kinds_of(set(keys))
    if len(kinds) != 1:
        return {"ambiguous" if kinds else "incomplete": names}
    entries = {part: weights.stored[key] for part, key in keys.items()}
    mistyped = [
        f"{keys[part]} {entry.dtype}"
        for part, entry in entries.items()
        if entry.dtype not in (NUMBER_TYPES if part in NUMBERS else WEIGHT_TYPES)
    ]
    if mistyped:
        return {"mistyped": mistyped}
    shapes = {part: trimmed(entry.shape) for part, entry in entries.items()}
    goal = trimmed(target.shape)
    if len(goal) == 1 and kinds[0] is not FULL:
        return {"misshaped": [f"{name} (expected {FULL.name} of a norm)" for name in names]}
    try:
        expected = kinds[0].expected(shapes, goal)
    except KeyError:  # a part is missing
        return {"incomplete": names}
    if expected.keys() - keys.keys():
        return {"incomplete": names}
    for part in keys:
        if part in NUMBERS:
            expected[part] = shapes[part] if entries[part].count == 1 else ()
        elif part in (DORA, MAGNITUDE):
            expected[part] = magnitude_shape(part, shapes[part], goal)
    wrong = [part for part in keys if shapes[part] != expected.get(part) or not entries[part].count]
    if not wrong:
        return {}
    return {"misshaped": [f"{keys[p]} {entries[p].shape} (expected {expected.get(p)})" for p in wrong]}


def read_change(
    module: str, keys: Mapping[str, str], target: Target, weights: Weights, scales: Mapping[str, LoraScale]
) -> Change:
    """The change of one weight, with its scale. Raises CheckpointError for a non-finite scale."""
    (kind,) = kinds_of(set(keys))
    rank = kind.rank({part: trimmed(weights.stored[key].shape) for part, key in keys.items()})
    scale = module_scale(module, keys, rank, weights, scales if kind is LORA else {})
    if SCALAR in keys:
        scale *= weights.read(keys[SCALAR]).float().item()
    if not math.isfinite(scale):
        raise CheckpointError(f"{keys.get(ALPHA, module)}: the alpha of a LoRA must be finite")
    parts = {part: key for part, key in keys.items() if part not in NUMBERS}
    return Change(target, kind, parts, rank, scale)


def module_scale(
    module: str,
    keys: Mapping[str, str],
    rank: int | None,
    weights: Weights,
    scales: Mapping[str, LoraScale],
) -> float:
    """alpha / rank of a module's change; 1 without an alpha or for a kind without a rank."""
    if rank is None:
        return 1.0
    if ALPHA in keys:
        return weights.read(keys[ALPHA]).float().item() / rank
    network, _, inner = module.partition(".")
    if network in scales:
        return scales[network].scale(inner, rank)
    return scales.get("", LoraScale()).scale(module, rank)

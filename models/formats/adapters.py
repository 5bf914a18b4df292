"""Reads the configuration of LoRA files: the scale of their changes. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import CheckpointError
from models.formats.config_files import Config, parse_json, read_json, shortened
from models.formats.safetensors import Header

PEFT_CONFIG = "adapter_config.json"  # next to PEFT's weights
PEFT_WEIGHTS = "adapter_model.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # the same configuration in the header of a diffusers file
NETWORKS = ("unet", "text_encoder", "text_encoder_2")  # prefixes of PEFT and diffusers
MAX_PATTERNS = 1000
MAX_PATTERN_CHARS = 256
MAX_REPETITIONS = 2  # in a pattern


@dataclass(frozen=True)
class LoraScale:
    """The scale of a LoRA's changes, as PEFT's configuration gives it for a network."""

    alpha: float | None = None  # None: the rank, so that the scale is 1
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()  # of modules' names, each with its alpha
    rank_stabilised: bool = False  # alpha is divided by the square root of the rank (rsLoRA)

    def scale(self, module: str, rank: int) -> float:
        """The scale of a module that has no alpha of its own in the file."""
        matching = (alpha for pattern, alpha in self.patterns if pattern.fullmatch(module))
        alpha = next(matching, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_lora_scales(file: Path, header: Header) -> dict[str, LoraScale]:
    """The scales that a LoRA's configuration gives, by network; "" for the file's only network.

    Raises CheckpointError, also for kinds of changes that cannot be merged.
    """
    if file.suffix.lower() != ".safetensors":
        return {}
    try:
        values = parse_json(header.metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {METADATA_KEY} in its header is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: {METADATA_KEY} in its header must be an object")
    configs: dict[str, Config] = {}
    adjacent = file.parent / PEFT_CONFIG
    if file.name == PEFT_WEIGHTS and adjacent.is_file():
        configs[""] = read_json(adjacent)
    for network in NETWORKS:
        prefix = network + "."
        own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        if own:
            configs[network] = own
    return {network: lora_scale(config, file) for network, config in configs.items()}


def lora_scale(config: Mapping[str, Any], file: Path) -> LoraScale:
    """The scale in PEFT's configuration of one network. Raises CheckpointError for unsupported kinds."""
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        raise CheckpointError(f"{file} is of the kind {shortened(kind)}, which is not supported")
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(is_number, (*patterns.values(), alpha or 0))):
        raise CheckpointError(f"{file}: lora_alpha and alpha_pattern in its configuration must be numbers")
    if len(patterns) > MAX_PATTERNS:
        raise CheckpointError(f"{file}: alpha_pattern has more than {MAX_PATTERNS} entries")
    compiled = tuple((compile_pattern(text, file), value) for text, value in patterns.items())
    return LoraScale(alpha, compiled, bool(config.get("use_rslora")))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def compile_pattern(text: str, file: Path) -> re.Pattern[str]:
    """A regular expression for the end of a module's name.

    Raises CheckpointError for a pattern that may take long to match, such as repeated groups.
    """
    try:
        if len(text) > MAX_PATTERN_CHARS:
            raise ValueError(f"it has more than {MAX_PATTERN_CHARS} characters")
        if len(re.findall(r"[*+?{]", text)) > MAX_REPETITIONS or re.search(r"\)[*+{]", text):
            raise ValueError("it has too many repetitions")
        return re.compile(rf"(?:.*\.)?(?:{text})")
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: alpha_pattern has {shortened(text)}, which is not supported: {error}"
        ) from error

"""Command-line flags that stand for settings, shared by several commands."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from typing import Any

from service.settings import Settings, as_text, read_settings, variable

SETTINGS: dict[str, Field[Any]] = {field.name: field for field in fields(Settings)}
# Settings without a flag: secrets, which `ps` would show, and failures for tests.
NO_FLAG = ("api_keys", "faults")
# The flags of `ldm serve` that its --help shows first; the rest comes in a group of its own.
SERVE_FIRST = (
    "model",
    "host",
    "port",
    "device",
    "dtype",
    "allow_pickle",
    "vocabulary",
    "vae",
    "lora",
    "embedding",
    "prediction",
    "weights",
    "invariant",
    "api_key_file",
)
SERVE_OTHERS = tuple(name for name in SETTINGS if name not in (*SERVE_FIRST, *NO_FLAG))
# The settings of commands that run a model without a server.
ONE_SHOT = (
    "model",
    "device",
    "dtype",
    "threads",
    "allow_pickle",
    "vocabulary",
    "vae",
    "embedding",
    "prediction",
    "weights",
)
CHECKPOINT = (
    "allow_pickle",
    "prediction",
    "weights",
)  # the settings of commands that read a checkpoint's description
REPEATABLE = ("lora", "vae", "embedding", "cors_origins", "alias")  # each flag of these adds one entry


class UsageError(ValueError):
    """The command's arguments are wrong."""


def add_settings(
    command: argparse.ArgumentParser | argparse._ArgumentGroup, *names: str, several_models: bool = False
) -> None:
    """Flags for settings; variables LDM_* and the defaults apply where a flag is missing.

    several_models: --model takes more than one value, which cannot be combined with positional arguments.
    """
    for name in names:
        field = SETTINGS[name]
        how: dict[str, Any] = {"metavar": name.upper()}
        if isinstance(field.default, bool):
            how = {"action": "store_const", "const": "true"}
        elif name == "model" and several_models:
            how |= {"nargs": "+", "action": "extend"}
        elif name in REPEATABLE:
            how |= {"action": "append"}
        command.add_argument(flag(name), help=help_of(field), **how)


def help_of(field: Field[Any]) -> str:
    """The help of a setting's flag."""
    repeat = " May be repeated." if field.name in REPEATABLE else ""
    meaning, default = field.metadata["meaning"], as_text(field.default) or "none"
    return f"{meaning}{repeat} ({variable(field.name)}; default: {default})"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_of(args: argparse.Namespace, *names: str) -> Settings:
    """Settings from flags, then the environment, then the settings file, then defaults.

    Raises SettingError.
    """
    texts = {name: getattr(args, name) for name in names}
    texts = {name: as_text(text) for name, text in texts.items() if text is not None}
    return read_settings(flags=texts, config=getattr(args, "config", None))

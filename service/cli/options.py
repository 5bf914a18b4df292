"""The command-line flags of settings, shared by several commands."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from service.settings import Settings, as_text, read_settings, variable

SETTINGS: dict[str, Field[Any]] = {field.name: field for field in fields(Settings)}
# Settings without a flag: API keys, which `ps` would show to other users, and injected failures for tests.
NO_FLAG = ("api_keys", "faults")
# Settings whose flags `ldm serve --help` shows first; the others follow in a group of their own.
SERVE_FIRST = (
    "model",
    "model_dir",
    "lora_dir",
    "host",
    "port",
    "device",
    "dtype",
    "allow_pickle",
    "vocabulary",
    "vae",
    "tiny_vae",
    "lora",
    "embedding",
    "controlnet",
    "reference_adapter",
    "image_encoder",
    "prediction",
    "weights",
    "invariant",
    "api_key_file",
    "key_table",
)
SERVE_OTHERS = tuple(name for name in SETTINGS if name not in (*SERVE_FIRST, *NO_FLAG))
# The settings of commands that run a model without a server.
ONE_SHOT = (
    "model",
    "model_dir",
    "device",
    "dtype",
    "threads",
    "allow_pickle",
    "vocabulary",
    "vae",
    "tiny_vae",
    "embedding",
    "controlnet",
    "reference_adapter",
    "image_encoder",
    "prediction",
    "weights",
    "provenance",
    "c2pa_cert",
    "c2pa_key",
)
RENDER = (*ONE_SHOT, "lora_dir")  # of `ldm generate`, `inpaint` and `upscale`
# Settings of commands that only describe or convert checkpoints.
CHECKPOINT = ("allow_pickle", "prediction", "weights")
REPEATABLE = (
    "model_dir",
    "lora_dir",
    "lora",
    "vae",
    "tiny_vae",
    "embedding",
    "controlnet",
    "reference_adapter",
    "image_encoder",
    "cors_origins",
    "alias",
)  # may be given several times


class UsageError(ValueError):
    """The command's arguments are wrong."""


def add_settings(
    command: argparse.ArgumentParser | argparse._ArgumentGroup, *names: str, several_models: bool = False
) -> None:
    """Add the flags of settings. Without a flag, the variable LDM_* or the default applies.

    several_models: --model takes several values, which is not possible in commands with positional arguments.
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


def quoted(value: Any) -> Any:
    """A flag's value; in double quotes if it is an existing path with a comma, so that it stays one entry."""
    if isinstance(value, list):
        return [quoted(entry) for entry in value]
    is_path = isinstance(value, str) and "," in value and '"' not in value
    return f'"{value}"' if is_path and Path(value.partition("=")[2] or value).exists() else value


def settings_of(args: argparse.Namespace, *names: str) -> Settings:
    """Settings from flags, then the environment, then the settings file, then defaults.

    Raises SettingError.
    """
    texts = {name: getattr(args, name) for name in names}
    texts = {name: as_text(quoted(text)) for name, text in texts.items() if text is not None}
    return read_settings(flags=texts, config=getattr(args, "config", None))

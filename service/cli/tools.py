"""`ldm models`, `inspect`, `convert`, `bench`, `openapi` and `settings`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import Field
from pathlib import Path
from typing import Any

from models.errors import CheckpointError
from models.formats.identify import read_spec
from models.spec import ModelSpec
from service.bench.arguments import add_arguments
from service.catalogue import KINDS, Folders, ignored
from service.cli.options import CHECKPOINT, NO_FLAG, ONE_SHOT, SETTINGS, add_settings, flag, settings_of
from service.model_paths import adapter_file, identify_all, locate_folders
from service.settings import DTYPES, Settings, as_text, variable

LISTED = ("model", "model_dir", "lora_dir", *CHECKPOINT)  # settings of `ldm models`


def add_models(command: argparse.ArgumentParser) -> None:
    add_settings(command, *LISTED, several_models=True)
    command.set_defaults(command=list_models)


def list_models(args: argparse.Namespace) -> int:
    """Print one line for each model, the names of other files in folders, and what is ignored there."""
    settings = settings_of(args, *LISTED)
    options = settings.allow_pickle, settings.prediction, settings.weights
    locate_folders((*settings.model_dir, *settings.lora_dir))
    folders = Folders(settings)
    for name, path in folders.models.items():
        print(model_line(read_spec(path, *options), name))
    catalogue = folders.read()
    unused = list(catalogue.ignored)
    vaes = {name: Path(vae.path) for name, vae in catalogue.separate_vaes().items()}
    for entry in catalogue.of("model"):
        try:
            (source,) = identify_all({entry.name: Path(entry.path)}, *options, vaes).values()
            print(model_line(source.spec, entry.name))
        except CheckpointError as error:
            unused.append(ignored(entry, str(error)))
    for kind in KINDS[1:]:
        if names := [entry.name for entry in catalogue.of(kind)]:
            print(f"{kind.replace('_', ' ')}: {', '.join(names)}")
    for file, reason in unused:
        print(f"ldm: {file} is ignored: {reason}", file=sys.stderr)
    return 0


def model_line(spec: ModelSpec, name: str) -> str:
    d = spec.defaults
    defaults = f"{d.width}x{d.height}, {d.steps} steps, guidance {d.guidance_scale:g}"
    return f"{name}  {defaults}, {', '.join(spec.tasks)}"


def add_inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="a model or any adapter: a folder, or a .safetensors or .ckpt file",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--base",
        metavar="MODEL",
        type=Path,
        help="with an adapter: also say what of it this model does not use, or why it does not fit",
    )
    add_settings(command, *CHECKPOINT)
    command.set_defaults(command=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """Print a description of a checkpoint or an adapter; returns 1 if its tensors do not fit."""
    from models.adapters import inspection as adapters  # imports torch
    from models.checkpoint import inspection

    settings = settings_of(args, *CHECKPOINT)
    base = read_spec(args.base, settings.allow_pickle, settings.prediction) if args.base else None
    path = adapter_file(args.path) or args.path
    if path.exists() and (adapter := adapters.inspect_adapter(path, settings.allow_pickle, base)):
        print(adapters.as_json(adapter) if args.json else adapters.as_text(adapter))
        return 1 if adapter.problems else 0
    report = inspection.inspect(args.path, settings.allow_pickle, settings.prediction, settings.weights)
    print(inspection.as_json(report) if args.json else inspection.as_text(report))
    return 1 if report.problems else 0


def add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="IN", type=Path, help="a folder, or a .safetensors or .ckpt file")
    command.add_argument("target", metavar="OUT", type=Path, help="folder to write to; new or empty")
    command.add_argument("--dtype", choices=DTYPES[1:], help="dtype of the weights (default: unchanged)")
    command.add_argument(
        "--unet",
        metavar="PATH",
        type=Path,
        help="a UNet alone that takes the place of the model's own: a file, or a folder with a config.json",
    )
    add_settings(command, *CHECKPOINT)
    command.set_defaults(command=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    """Convert a checkpoint to a folder of safetensors files; a failure leaves no files behind."""
    from models.checkpoint.conversion import convert  # torch

    settings = settings_of(args, *CHECKPOINT)
    convert(
        args.source,
        args.target,
        args.dtype,
        settings.allow_pickle,
        settings.prediction,
        settings.weights,
        args.unet,
    )
    print(args.target)
    return 0


def add_bench(command: argparse.ArgumentParser) -> None:
    add_arguments(command)
    add_settings(command, *ONE_SHOT, "invariant")
    command.set_defaults(command=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Send requests to a server and report its throughput and latencies."""
    from service.bench.command import bench

    return bench(args, settings_of(args, *ONE_SHOT, "invariant"))


def add_openapi(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=print_openapi)


def print_openapi(args: argparse.Namespace) -> int:
    """Print the OpenAPI document, as committed in service/openapi.json."""
    from service.api.app import create_app
    from service.api.openapi import document_text

    print(document_text(create_app(Settings())), end="")
    return 0


def add_settings_table(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=print_settings)


def print_settings(args: argparse.Namespace) -> int:
    """Print the table of settings in service/README.md."""
    print("\n".join(settings_table()))
    return 0


def settings_table() -> Iterator[str]:
    """The lines of a Markdown table of all settings."""
    yield "| flag | variable | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in SETTINGS.items():
        cells = (markdown_flag(name), f"`{variable(name)}`", markdown_default(field), markdown_meaning(field))
        yield f"| {' | '.join(cells)} |"


def markdown_flag(name: str) -> str:
    return "none" if name in NO_FLAG else f"`{flag(name)}`"


def markdown_default(field: Field[Any]) -> str:
    default = as_text(field.default)
    return f"`{default}`" if default else "none"


def markdown_meaning(field: Field[Any]) -> str:
    """The meaning, and the accepted values."""
    text = f"{field.metadata['meaning']} Accepts {field.metadata['parser'].expected}."
    return text.replace("|", r"\|").replace("*", r"\*")

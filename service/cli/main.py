"""The `ldm` command: its subcommands and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from models.errors import CheckpointError
from service.cli import keys, render, render_arguments, tools
from service.cli.options import SERVE_FIRST, SERVE_OTHERS, add_settings, settings_of
from service.errors import ServiceError
from service.model_paths import ModelPathError
from service.settings import SettingError

USER_ERRORS = (SettingError, ModelPathError, CheckpointError, ValueError)  # exit code 2

# Name, arguments, function, help.
RENDER_COMMANDS = (
    ("generate", render_arguments.add_generate, render.generate, "generate images"),
    ("inpaint", render_arguments.add_inpaint, render.inpaint, "repaint a part of an image"),
    ("upscale", render_arguments.add_upscale, render.upscale, "enlarge an image"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0; 1 if the work failed; 2 if the arguments are wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:  # has its own argument parser, and so its own --help
        from models.training.cli import main as train

        return train(argv[1:]) or 0
    args = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        code = command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of stdout has left, as in `ldm models | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
        return 1
    except USER_ERRORS as error:
        return complain(error, 2)
    except ServiceError as error:
        return complain(error, 2 if error.param else 1)
    except KeyboardInterrupt:
        return 130


def complain(error: Exception, code: int) -> int:
    """Print the error on one line of stderr; returns the exit code."""
    print(f"ldm: {error}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    top = argparse.ArgumentParser(
        prog="ldm", description="Serve latent diffusion models over HTTP, or run them from the command line."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_serve(commands.add_parser("serve", help="serve models over HTTP"))
    for name, add_arguments, run, meaning in RENDER_COMMANDS:
        command = commands.add_parser(name, help=f"{meaning}, without a server")
        add_arguments(command)
        command.set_defaults(command=run)
    tools.add_models(commands.add_parser("models", help="list the models that can be served"))
    tools.add_inspect(
        commands.add_parser("inspect", help="describe a model or an adapter without loading it")
    )
    tools.add_convert(commands.add_parser("convert", help="convert a checkpoint to a safetensors folder"))
    tools.add_bench(commands.add_parser("bench", help="measure a server under load"))
    keys.add_keys(commands.add_parser("keys", help="make API keys"))
    tools.add_openapi(commands.add_parser("openapi", help="print the OpenAPI document"))
    tools.add_settings_table(commands.add_parser("settings", help="print all settings as a Markdown table"))
    commands.add_parser("train", help="train and evaluate models; has its own --help", add_help=False)
    return top


def add_serve(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", metavar="FILE", help="settings file, in TOML (LDM_CONFIG; default: none)"
    )
    add_settings(command, *SERVE_FIRST, several_models=True)
    others = command.add_argument_group("performance, limits and operation")
    add_settings(others, *SERVE_OTHERS)
    command.set_defaults(command=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    from service.cli.serve import serve  # the web server: other commands start faster without it

    failure = serve(settings_of(args, *SERVE_FIRST, *SERVE_OTHERS))
    return complain(failure, 2 if failure.wrong_setting else 1) if failure else 0

"""The `ldm` command."""

from __future__ import annotations

import argparse
import asyncio
import base64
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from models.formats.diffusers_read import CheckpointError, read_spec
from models.spec import Spacing
from service import logs
from service.bench.arguments import add_arguments
from service.engine.events import Done, Event, Failed, Started, Stepped
from service.engine.job import Job
from service.errors import ServiceError, from_code
from service.model_paths import (
    ModelPathError,
    locate_all,
    locate_embeddings,
    locate_loras,
    locate_vaes,
    read_specs,
)
from service.requests import images, resolve, response
from service.requests.schemas import GenerateRequest, InpaintRequest, PictureRequest, UpscaleRequest
from service.settings import (
    DTYPES,
    Given,
    SettingError,
    Settings,
    as_text,
    misspelt,
    parse,
    read_settings,
    variable,
)

ASKED = (
    "prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "seed", "n", "sampler", "eta",
    "spacing", "long_prompts", "prompt_weights", "strength", "class_label", "boxes", "scale", "noise_level",
)  # fmt: skip
# Settings that ldm serve has flags for: all but what nobody should read off a list of processes, and faults.
# The first are told first.
SERVED = (
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
    "invariant",
    "api_key_file",
)
OTHERS = tuple(f.name for f in fields(Settings) if f.name not in (*SERVED, "api_keys", "faults"))
ALONE = ("model", "device", "dtype", "allow_pickle", "vocabulary", "vae", "embedding", "prediction")
USER_ERRORS = (SettingError, ModelPathError, CheckpointError, ValueError)  # exit 2: asked for what cannot be

# After the drain, 16 seconds at most: for jobs whose end nobody knows yet, for whoever comes back at once,
# and for answers that are on their way.
COLLECT_SECONDS = 5.0
LINGER_SECONDS = 1.0
GRACE_SECONDS = 10


log = logging.getLogger(__name__)


class UsageError(ValueError):
    """A command that cannot be carried out as it was typed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 when the work failed, 2 when the request was wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:  # it reads its own arguments, --help included
        from models.training.cli import main as train

        return train(argv[1:]) or 0
    args = parser().parse_args(argv)
    try:
        return args.command(args)
    except USER_ERRORS as error:
        return complain(error, 2)
    except ServiceError as error:
        return complain(error, 2 if error.param else 1)
    except KeyboardInterrupt:
        return 130


def complain(error: Exception, code: int) -> int:
    """One line on stderr."""
    print(f"ldm: {error}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    top = argparse.ArgumentParser(prog="ldm", description="Latent diffusion: serve it, or use it from here.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_serve(commands.add_parser("serve", help="answer requests over HTTP"))
    add_generate(commands.add_parser("generate", help="make pictures from a prompt, without a server"))
    add_inpaint(commands.add_parser("inpaint", help="paint a part of a picture anew, without a server"))
    add_upscale(commands.add_parser("upscale", help="enlarge a picture, without a server"))
    listing = commands.add_parser("models", help="list the models that can be served")
    add_settings(listing, "model", "allow_pickle", "prediction", several=True)
    listing.set_defaults(command=list_models)
    add_inspect(commands.add_parser("inspect", help="say what a checkpoint is, without loading it"))
    add_convert(commands.add_parser("convert", help="write a checkpoint as a folder in safetensors"))
    add_bench(commands.add_parser("bench", help="measure a server under load"))
    printing = commands.add_parser("openapi", help="print the description of the API")
    printing.set_defaults(command=print_description)
    commands.add_parser("train", help="train and evaluate models; has its own --help", add_help=False)
    return top


def add_settings(
    command: argparse.ArgumentParser | argparse._ArgumentGroup, *names: str, several: bool = False
) -> None:
    """Flags for settings; the environment's LDM_* fill in for those that are left out.

    several: --model takes more than one; not beside positional arguments, which it would swallow.
    """
    helps = {
        "model": "a model in the box, emoji or emoji-upscale, or the folder or the file of a model",
        "host": "address to listen at",
        "port": "port to listen at",
        "device": "auto, cpu, cuda or cuda:N",
        "dtype": "auto, float16, bfloat16 or float32",
        "allow_pickle": "read .ckpt and .bin files too, which never run code even then",
        "vocabulary": "vocab.txt of bert-base-uncased, or its folder, for models that read its words",
        "vae": "a VAE in the place of the model's own, folder or file; MODEL=PATH for one of several",
        "embedding": "a word that prompts can use (textual inversion), NAME=PATH; may be given again",
        "lora": "a LoRA that requests can ask for, NAME=PATH; may be given again",
        "prediction": "epsilon or v_prediction: of Stable Diffusion 2 in one file, unless a YAML file says",
        "invariant": "the same bytes for a request in any company, and a lower throughput",
        "api_key_file": "a file of API keys, one a line; who has none of them gets a 401",
    }
    for name in names:
        setting = Settings.__dataclass_fields__[name]
        default = setting.default
        how: dict[str, Any] = {"metavar": name.upper()}
        if isinstance(default, bool):
            how = {"action": "store_const", "const": "true"}
        elif name == "model" and several:
            how |= {"nargs": "+", "action": "extend"}
        elif name in ("lora", "vae", "embedding"):
            how |= {"action": "append"}
        shown = as_text(default) or "none"
        about = (
            f"{helps.get(name) or setting.metadata['parser'].expected} ({variable(name)}; default: {shown})"
        )
        command.add_argument(f"--{name.replace('_', '-')}", help=about, **how)


def settings_of(args: argparse.Namespace, *names: str) -> Settings:
    """Settings from flags, then the environment, then the file, then defaults. Raises SettingError."""
    texts = {name: getattr(args, name) for name in names}
    texts = {name: as_text(text) for name, text in texts.items() if text is not None}
    return read_settings(flags=texts, config=getattr(args, "config", None))


def add_serve(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="settings, in TOML (LDM_CONFIG; default: none)")
    add_settings(command, *SERVED, several=True)
    rest = command.add_argument_group("for operators", "service/settings.py tells what a wrong value costs")
    add_settings(rest, *OTHERS)
    command.set_defaults(command=serve)


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; then finish what runs. A second signal ends at once."""
    import uvicorn

    from service.api.app import create_app

    settings = settings_of(args, *SERVED, *OTHERS)
    models = locate_all(settings.model, settings.allow_pickle)  # a name that is wrong now stays wrong
    locate_loras(settings.lora)
    locate_vaes(settings.vae, models)
    locate_embeddings(settings.embedding)
    logs.set_up(settings)
    for sentence in misspelt(os.environ):
        log.warning("%s", sentence)
    app = create_app(settings)
    supervisor = app.state.supervisor
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        log_level=settings.log_level,
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )

    class Server(uvicorn.Server):
        """Drains before it stops listening, and stops when no worker can be had."""

        async def startup(self, sockets: list | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            self.tasks = [self.loop.create_task(self.stop_on_failure())]
            await super().startup(sockets)

        def handle_exit(self, sig: int, frame: object) -> None:
            if not self.started:  # and so nothing was admitted
                self.should_exit = True
            elif supervisor.draining:
                self.should_exit = self.force_exit = True
            else:
                self.loop.call_soon_threadsafe(self.begin_drain)

        def begin_drain(self) -> None:
            self.tasks.append(self.loop.create_task(self.drain()))

        async def drain(self) -> None:
            busy, jobs = supervisor.slots_in_use > 0, app.state.jobs
            asked = self.loop.create_task(jobs.collected(COLLECT_SECONDS))
            await asyncio.gather(supervisor.drain(), asked)
            # Whoever had an answer just now and comes back is told to go elsewhere, not cut off.
            await asyncio.sleep(LINGER_SECONDS if busy else 0)
            self.should_exit = True

        async def stop_on_failure(self) -> None:
            await supervisor.failed.wait()
            self.should_exit = True

    Server(config).run()
    return complain(supervisor.failure, 1) if supervisor.failure else 0


def add_generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", metavar="PROMPT", nargs="?")
    add_making(command)
    add_scene(command)
    command.add_argument("--init-image", metavar="FILE", help="a picture to start from")
    command.set_defaults(command=generate)


def add_inpaint(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or WebP file")
    command.add_argument("mask", metavar="MASK", help="a picture of the same size; white: paint anew")
    command.add_argument("prompt", metavar="PROMPT", nargs="?")
    add_making(command)
    add_scene(command)
    command.set_defaults(command=inpaint)


def add_upscale(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or WebP file")
    add_making(command)
    command.add_argument("--prompt", help="what it shows, for models that read prompts")
    command.add_argument("--scale", type=int, metavar="N", help="default: the model's own")
    command.add_argument("--noise-level", type=int, metavar="N", help="noise to hide its faults in")
    command.set_defaults(command=upscale)


def add_making(command: argparse.ArgumentParser) -> None:
    """What all commands that make pictures take."""
    command.add_argument("-o", "--output", metavar="FILE", required=True, help="its suffix says the format")
    command.add_argument("--negative-prompt", help="what the picture should not show")
    for name in ("steps", "seed", "n"):
        command.add_argument(f"--{name}", type=int, metavar="N")
    for name in ("guidance-scale", "eta"):
        command.add_argument(f"--{name}", type=float, metavar="X")
    command.add_argument("--long-prompts", metavar="HOW", help="what is too long: cut, or chunk to read all")
    command.add_argument(
        "--prompt-weights", action="store_const", const=True,
        help="(word:1.3) and [word] weigh words of prompts",
    )  # fmt: skip
    command.add_argument("--sampler")
    command.add_argument("--spacing", help=f"of the timesteps: {', '.join(get_args(Spacing))}")
    command.add_argument(
        "--lora", metavar="NAME=PATH[:WEIGHT]", type=lora, action="append", default=[],
        help="a LoRA to use, at weight 1 if it has none; may be given again",
    )  # fmt: skip
    add_settings(command, *ALONE)


def add_scene(command: argparse.ArgumentParser) -> None:
    """What the commands take that make pictures of something."""
    for name in ("width", "height"):
        command.add_argument(f"--{name}", type=int, metavar="N")
    command.add_argument("--strength", type=float, metavar="X")
    command.add_argument("--class-label", metavar="LABEL", type=label, help="name or number, for a prompt")
    command.add_argument(
        "--box", dest="boxes", metavar="LABEL,X,Y,W,H", type=box, action="append",
        help="put LABEL there, in parts of the sides from the upper left; may be given again",
    )  # fmt: skip
    command.add_argument("--segmentation", metavar="FILE", help="a picture of the colours of labels")


def label(text: str) -> int | str:
    """A class by its number or its name."""
    return int(text) if text.isdecimal() else text


def lora(text: str) -> tuple[str, float]:
    """NAME=PATH, as settings have it, and the weight that came after it."""
    path, _, end = text.rpartition(":")
    try:
        named, weight = path, float(end)
    except ValueError:
        named, weight = text, 1.0
    try:
        (one,) = parse("lora", Given(named, "--lora", "the command line"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=PATH or NAME=PATH:WEIGHT") from None
    return one, weight


def box(text: str) -> dict[str, Any]:
    """LABEL,X,Y,W,H as requests carry it."""
    name, *numbers = text.rsplit(",", 4)
    try:
        x, y, w, h = map(float, numbers)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected LABEL,X,Y,W,H") from None
    return {"name": name, "x": x, "y": y, "w": w, "h": h}


def generate(args: argparse.Namespace) -> int:
    """Make pictures in this process and write them."""
    return make(args, GenerateRequest, {"init_image": args.init_image, "segmentation": args.segmentation})


def inpaint(args: argparse.Namespace) -> int:
    """Paint a part of a picture anew in this process and write it."""
    pictures = {"image": args.image, "mask": args.mask, "segmentation": args.segmentation}
    return make(args, InpaintRequest, pictures)


def upscale(args: argparse.Namespace) -> int:
    """Enlarge a picture in this process and write it."""
    return make(args, UpscaleRequest, {"image": args.image})


def make(args: argparse.Namespace, kind: type[PictureRequest], pictures: Mapping[str, str | None]) -> int:
    """Make what a request of this kind asks for; pictures: field -> file, if there is one."""
    output = Path(args.output)
    suffix = checked(output)
    settings = replace(settings_of(args, *ALONE), lora=tuple(named for named, _ in args.lora))
    places, loras = locate_all(settings.model, settings.allow_pickle), locate_loras(settings.lora)
    specs = read_specs(places, settings.allow_pickle, settings.prediction)
    specs = {name: replace(spec, loras=tuple(loras)) for name, spec in specs.items()}  # what fits shows later
    body = request_of(args, kind, {name: file for name, file in pictures.items() if file})
    order = resolve.with_format(resolve.to_order(body, specs, settings), images.SUFFIXES[suffix], "output")
    done = run_alone(order.job, settings)
    for index, parts in enumerate(response.parts_of(order, done)):
        file = numbered(output, index, order.job.n)
        write(file, response.file_of(order, index, parts))
        print(f"{file}  seed {order.job.seed + index}")
    for warning in order.warnings + done.warnings:
        print(f"ldm: {warning}", file=sys.stderr)
    return 0


def checked(output: Path) -> str:
    """Its suffix. Raises UsageError where no picture can be written, before any work is done."""
    suffix = output.suffix.lower()
    if suffix not in images.SUFFIXES:
        raise UsageError(f"--output is {str(output)!r}; expected the ending {', '.join(images.SUFFIXES)}")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output is {str(output)!r}; expected a folder that exists")
    return suffix


def request_of(
    args: argparse.Namespace, kind: type[PictureRequest], pictures: Mapping[str, str]
) -> PictureRequest:
    """The wire body of the arguments. Raises InvalidRequest; UsageError for files that cannot be read."""
    fields = {name: getattr(args, name) for name in ASKED if getattr(args, name, None) is not None}
    fields["loras"] = {named.partition("=")[0]: weight for named, weight in args.lora}
    try:
        return kind(**fields, **{name: base64_of(Path(file)) for name, file in pictures.items()})
    except ValidationError as error:
        raise resolve.explain(error.errors()) from None


def base64_of(file: Path) -> str:
    """A file as requests carry it. Raises UsageError where it cannot be read."""
    try:
        return base64.b64encode(file.read_bytes()).decode()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None


def write(file: Path, content: bytes) -> None:
    """Raises UsageError where the file cannot be written."""
    try:
        file.write_bytes(content)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from None


def numbered(file: Path, index: int, n: int) -> Path:
    """FILE itself for one picture; FILE-0, FILE-1, ... for several."""
    return file if n == 1 else file.with_stem(f"{file.stem}-{index}")


def run_alone(job: Job, settings: Settings) -> Done:
    """One job on an engine in this process, with a progress bar. Raises the job's ServiceError."""
    from tqdm import tqdm

    from service.device.loading import build  # torch
    from service.engine.engine import Engine

    places = locate_all(settings.model, settings.allow_pickle)
    vaes = locate_vaes(settings.vae, places)
    settings = replace(settings, vae=(str(vaes[job.model]),) if job.model in vaes else ())
    runner = build(settings, {job.model: places[job.model]})
    ended: list[Event] = []
    with tqdm(total=job.n * job.steps, unit="step", leave=False) as bar:

        def emit(event: Event) -> None:
            if isinstance(event, Started):
                bar.reset(event.steps)
            elif isinstance(event, Stepped):
                bar.update(dict(event.jobs)[job.id] - bar.n)
            elif isinstance(event, Done | Failed):
                ended.append(event)

        engine = Engine(runner, emit, settings.max_rows, settings.decode_chunk)
        engine.submit(job)
        while engine.busy:
            engine.tick()
    if isinstance(ended[0], Failed):
        raise from_code(ended[0].code)
    return ended[0]


def add_bench(command: argparse.ArgumentParser) -> None:
    add_arguments(command)
    add_settings(command, *ALONE, "invariant")
    command.set_defaults(command=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Send many requests and say how it went."""
    from service.bench.command import bench

    return bench(args, settings_of(args, *ALONE, "invariant"))


def list_models(args: argparse.Namespace) -> int:
    """One line a model."""
    settings = settings_of(args, "model", "allow_pickle", "prediction")
    for name, path in locate_all(settings.model, settings.allow_pickle).items():
        spec = read_spec(path, settings.allow_pickle, settings.prediction)
        d = spec.defaults
        made = f"{d.width}x{d.height}, {d.steps} steps, guidance {d.guidance_scale:g}"
        print(f"{name}  {made}, {', '.join(spec.tasks)}")
    return 0


def print_description(args: argparse.Namespace) -> int:
    """The API's, as it is committed in service/openapi.json."""
    from service.api.app import create_app
    from service.api.openapi import document_text

    print(document_text(create_app(Settings())), end="")
    return 0


def add_inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="PATH", type=Path, help="a folder, or a .safetensors or .ckpt file")
    command.add_argument("--json", action="store_true", help="for machines")
    add_settings(command, "allow_pickle", "prediction")
    command.set_defaults(command=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """Say what a checkpoint is; 1 where something is missing or unexpected in it."""
    from models.checkpoint.inspection import as_json, as_text, inspect  # torch

    settings = settings_of(args, "allow_pickle", "prediction")
    report = inspect(args.path, settings.allow_pickle, settings.prediction)
    print(as_json(report) if args.json else as_text(report))
    return 1 if report.problems else 0


def add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="IN", type=Path, help="a folder, or a .safetensors or .ckpt file")
    command.add_argument("target", metavar="OUT", type=Path, help="a folder that is empty or not there")
    command.add_argument("--dtype", choices=DTYPES[1:], help="of the weights (default: as they are)")
    add_settings(command, "allow_pickle", "prediction")
    command.set_defaults(command=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    """Write a checkpoint as a folder in safetensors, whole or not at all."""
    from models.checkpoint.conversion import convert  # torch

    settings = settings_of(args, "allow_pickle", "prediction")
    convert(args.source, args.target, args.dtype, settings.allow_pickle, settings.prediction)
    print(args.target)
    return 0

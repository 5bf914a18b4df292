"""`ldm generate`, `inpaint` and `upscale`: run one request in this process, without a server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from models.spec import ModelSpec
from service.catalogue import Catalogue, Folders, Kind, read_catalogue
from service.cli.options import RENDER, UsageError, settings_of
from service.cli.phases import with_models
from service.cli.render_request import fields_from, request_of
from service.cli.run_job import run_job
from service.model_paths import TINY_VAE, identify_all, locate_folders, locate_loras, locate_vaes
from service.requests import images
from service.requests.resolve import OutputFormat, resolve
from service.requests.response import Result, encode_image, signing
from service.requests.schemas import AnyRequest, GenerateRequest, InpaintRequest, UpscaleRequest
from service.requests.signing import open_signer
from service.settings import Settings


def generate(args: argparse.Namespace) -> int:
    return render(args, GenerateRequest, {"init_image": args.init_image, "segmentation": args.segmentation})


def inpaint(args: argparse.Namespace) -> int:
    mask = None if args.mask == "-" else args.mask
    files = {"image": args.image, "mask": mask, "segmentation": args.segmentation}
    return render(args, InpaintRequest, files)


def upscale(args: argparse.Namespace) -> int:
    return render(args, UpscaleRequest, {"image": args.image})


def render(args: argparse.Namespace, kind: type[AnyRequest], files: Mapping[str, str | None]) -> int:
    """Run a request of this kind and write its images; `files`: field -> image file, or None."""
    output = Path(args.output)
    image_format = format_of(output)
    settings = with_models(settings_of(args, *RENDER), args)
    settings = replace(settings, lora=lora_entries(args, settings))
    paths, loras = Folders(settings).models, locate_loras(settings.lora)
    if not paths:
        raise UsageError("--model NAME is required with --model-dir")
    vaes = locate_vaes(settings.vae, paths)
    sources = identify_all(paths, settings.allow_pickle, settings.prediction, settings.weights, vaes)
    # Every LoRA is accepted here; loading the model fails if one does not fit.
    tiny = locate_vaes(settings.tiny_vae, paths, TINY_VAE)
    specs = {
        name: replace(source.spec, loras=tuple(loras), tiny_decoder=name in tiny)
        for name, source in sources.items()
    }
    specs = with_adapters(specs, settings)
    repeated = fields_from(args, specs, settings) if args.repeat else {}
    body = request_of(args, kind, {name: file for name, file in files.items() if file}, repeated)
    resolved = resolve(body, specs, settings, OutputFormat(image_format, "output"))
    job, encode = resolved.to_job(), signing(encode_image, open_signer(settings))
    result = Result(resolved, run_job(job, settings, sources))
    for index in range(job.n):
        file = numbered(output, index, job.n)
        write(file, encode(result, index))
        print(f"{file}  seed {job.image_seed(index)}")
    for warning in resolved.warnings + result.done.warnings:
        print(f"ldm: {warning}", file=sys.stderr)
    return 0


def lora_entries(args: argparse.Namespace, settings: Settings) -> tuple[str, ...]:
    """NAME=PATH of the LoRAs of --lora and --lora-dir. Raises UsageError for a name that is not there."""
    locate_folders(settings.lora_dir)
    given = [entry for entry, _ in args.lora if "=" in entry]
    taken: dict[Kind, Mapping[str, Path]] = {"lora": locate_loras(given)}
    folders = read_catalogue((), settings.lora_dir, settings.allow_pickle, taken)
    found = {entry.name: entry.path for entry in folders.of("lora") if "=" not in entry.name}
    for name in (entry for entry, _ in args.lora if "=" not in entry):
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise UsageError(f"--lora is {name!r}; expected NAME=PATH, or a LoRA of --lora-dir: {known}")
    return (*given, *(f"{name}={path}" for name, path in found.items()))


def with_adapters(specs: dict[str, ModelSpec], settings: Settings) -> dict[str, ModelSpec]:
    """The specs with the adapters that fit each model. Raises CheckpointError for one that fits none."""
    if not (settings.controlnet or settings.reference_adapter):
        return specs
    import torch

    from service.device.adapters import Adapters
    from service.device.shelf import Shelf

    adapters = Adapters(settings, torch.device("cpu"), torch.float32)
    adapters.check_given(specs)
    return adapters.read(Catalogue(), specs, Shelf({}, []))[0]


def format_of(output: Path) -> images.Format:
    """The format of the output file, by its suffix.

    Raises UsageError if no image can be written there, before any work is done.
    """
    suffix = output.suffix.lower()
    if suffix not in images.SUFFIXES:
        raise UsageError(f"--output is {str(output)!r}; expected the suffix {' or '.join(images.SUFFIXES)}")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output is {str(output)!r}; its folder does not exist")
    return images.SUFFIXES[suffix]


def write(file: Path, content: bytes) -> None:
    """Write a file. Raises UsageError if that is not possible."""
    try:
        file.write_bytes(content)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from None


def numbered(file: Path, index: int, n: int) -> Path:
    """FILE itself for one image; FILE-0, FILE-1, ... for several."""
    return file if n == 1 else file.with_stem(f"{file.stem}-{index}")

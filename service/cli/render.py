"""`ldm generate`, `inpaint` and `upscale`: run one request in this process, without a server."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from models.formats.identify import Source
from models.spec import ModelSpec, Spacing
from service.catalogue import Catalogue, Folders
from service.cli.from_image import fields_of_file
from service.cli.options import ONE_SHOT, UsageError, add_settings, settings_of
from service.cli.phases import add_hires, add_phases, hires_of, refiner_of, with_models
from service.engine.events import Done, Event, Failed, Started, Stepped
from service.engine.job import AdapterKey, Job
from service.errors import ServiceError, from_code
from service.model_paths import TINY_VAE, identify_all, locate_loras, locate_vaes
from service.requests import images
from service.requests.preprocessing import PREPROCESSORS
from service.requests.resolve import OutputFormat, build_request, resolve
from service.requests.response import Result, encode_image, signing
from service.requests.schemas import AnyRequest, GenerateRequest, InpaintRequest, UpscaleRequest
from service.requests.signing import open_signer
from service.settings import Given, Settings, parse

# Fields of a request that are arguments of the same name.
REQUEST_FIELDS = (
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "steps",
    "guidance_scale",
    "seed",
    "n",
    "sampler",
    "eta",
    "spacing",
    "long_prompts",
    "prompt_weights",
    "strength",
    "guidance_start",
    "guidance_end",
    "guidance_rescale",
    "image_guidance_scale",
    "prompt_syntax",
    "decoder",
    "tiling",
    "clip_skip",
    "class_label",
    "boxes",
    "scale",
    "noise_level",
    "mask_blur",
    "area",
    "padding",
    "fill",
    "extend",
)


def add_generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", metavar="PROMPT", nargs="?", help="what the image shows")
    add_common(command)
    add_scene(command)
    command.add_argument("--init-image", metavar="FILE", help="start from this image, or edit it")
    command.add_argument(
        "--image-guidance-scale",
        type=float,
        metavar="X",
        help="how closely the result follows the image, with models that edit (default: 1.5)",
    )
    add_hires(command)
    command.set_defaults(command=generate)


def add_inpaint(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or WebP file")
    command.add_argument(
        "mask",
        metavar="MASK",
        help="an image of the same size; white marks the pixels to repaint; - for none, with --extend",
    )
    command.add_argument("prompt", metavar="PROMPT", nargs="?", help="what the image shows")
    add_common(command)
    add_scene(command)
    add = command.add_argument
    add("--mask-blur", type=int, metavar="N", help="pixels over which the result fades into the image")
    add("--area", help="whole (default), or masked: generate a region around the mask at --width x --height")
    add("--padding", type=int, metavar="N", help="pixels around the mask in that region (default: 32)")
    add("--fill", help="initial content of the masked pixels: original (default), blur, noise or empty")
    add(
        "--extend",
        metavar="L,T,R,B",
        type=extend,
        help="outpainting: pixels to add at the left, top, right and bottom",
    )
    command.set_defaults(command=inpaint)


def add_upscale(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or WebP file")
    add_common(command)
    command.add_argument("--prompt", help="what the image shows, for models that take a prompt")
    command.add_argument(
        "--scale", type=int, metavar="N", help="how many times as large (default: the model's own)"
    )
    command.add_argument(
        "--noise-level", type=int, metavar="N", help="noise added to the input to hide its flaws"
    )
    command.set_defaults(command=upscale)


def add_common(command: argparse.ArgumentParser) -> None:
    """The arguments of all three commands."""
    add = command.add_argument
    add("-o", "--output", metavar="FILE", required=True, help="file to write; its suffix selects the format")
    add("--negative-prompt", help="what the image should not show")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's own)")
    add("--seed", type=int, metavar="N", help="seed of the noise (default: drawn, and printed)")
    add("--n", type=int, metavar="N", help="number of images, with seeds SEED, SEED + 1, ... (default: 1)")
    add("--guidance-scale", type=float, metavar="X", help="strength of classifier-free guidance; 1: none")
    add(
        "--eta",
        type=float,
        metavar="X",
        help="noise that ddim or tcd adds at each step, 0 to 1 (default: the model's; tcd: 0.3)",
    )
    add(
        "--long-prompts",
        metavar="HOW",
        help="a prompt longer than the model can read: cut (default) or chunk",
    )
    add(
        "--prompt-weights",
        action="store_const",
        const=True,
        help="read weights in prompts: (word:1.3) increases a word's weight, [word] decreases it",
    )
    add("--sampler", help="the sampling method (default: the model's)")
    add(
        "--spacing",
        help=f"timesteps or noise levels of the steps: {', '.join(get_args(Spacing))} (default: the model's)",
    )
    add(
        "--lora",
        metavar="NAME=PATH[:WEIGHT]",
        type=lora,
        action="append",
        default=[],
        help="apply a LoRA, with weight 1 unless given; may be repeated",
    )
    add(
        "--from",
        dest="repeat",
        metavar="FILE",
        help="repeat the request whose parameters this image file contains; other arguments take precedence",
    )
    add_settings(command, *ONE_SHOT)


def add_scene(command: argparse.ArgumentParser) -> None:
    """The arguments of `generate` and `inpaint` that describe the image."""
    add = command.add_argument
    add("--width", type=int, metavar="N", help="in pixels (default: the model's own)")
    add("--height", type=int, metavar="N", help="in pixels (default: the model's own)")
    add("--strength", type=float, metavar="X", help="how much of the input image to change, 0 to 1")
    add(
        "--guidance-start",
        type=float,
        metavar="X",
        help="fraction of the run at which guidance begins (default: 0)",
    )
    add(
        "--guidance-end",
        type=float,
        metavar="X",
        help="fraction of the run at which guidance ends (default: 1)",
    )
    add("--guidance-rescale", type=float, metavar="X", help="restore the contrast that guidance adds, 0 to 1")
    add_phases(command)
    add(
        "--feature-cache",
        type=int,
        metavar="N",
        help="compute deep features of the UNet at every N-th call only, 1 to 10: faster, less exact",
    )
    add("--prompt-syntax", help="plain (default), or a1111: weights, BREAK, AND, [from:to:when], [a|b]")
    add("--decoder", help="full (default), or tiny: the tiny VAE of --tiny-vae makes the image")
    add("--tiling", help="none (default), x, y or both: copies of the image fit together along these axes")
    add("--clip-skip", type=int, metavar="N", help="end the text encoders N - 1 layers earlier (default: 1)")
    add(
        "--variation-strength",
        type=float,
        metavar="X",
        help="mix the noise of a second seed into that of --seed, 0 to 1",
    )
    add("--variation-seed", type=int, metavar="N", help="the second seed (default: drawn)")
    add("--class-label", metavar="LABEL", type=label, help="a class, by name or number, instead of a prompt")
    add(
        "--box",
        dest="boxes",
        metavar="LABEL,X,Y,W,H",
        type=box,
        action="append",
        help="place LABEL in this box: left, top, width and height as fractions of the image (repeatable)",
    )
    add("--segmentation", metavar="FILE", help="an image in the colours of the model's labels")
    add(
        "--control",
        dest="controls",
        metavar="NAME=FILE[:SCALE]",
        type=guide,
        action="append",
        default=[],
        help="guide the layout by an image, through the --controlnet NAME; scale 1 unless given (repeatable)",
    )
    add(
        "--preprocess",
        metavar="HOW",
        help=f"how images of --control become control images: {', '.join(PREPROCESSORS)} (default: none)",
    )
    add(
        "--reference",
        dest="references",
        metavar="NAME=FILE[:SCALE]",
        type=guide,
        action="append",
        default=[],
        help="follow the content or style of an image, through the --reference-adapter NAME; scale 1 unless "
        "given (repeatable)",
    )


def extend(text: str) -> dict[str, int]:
    """L,T,R,B as a request's sides."""
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected L,T,R,B") from None
    return {"left": left, "top": top, "right": right, "bottom": bottom}


def label(text: str) -> int | str:
    """A class, by its number or its name."""
    return int(text) if text.isdecimal() else text


def lora(text: str) -> tuple[str, float]:
    """NAME=PATH or NAME=PATH:WEIGHT -> (NAME=PATH, weight)."""
    argument, weight = split_weight(text)
    try:
        (entry,) = parse("lora", Given(argument, "--lora", "the command line"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=PATH or NAME=PATH:WEIGHT") from None
    return entry, weight


def split_weight(text: str) -> tuple[str, float]:
    """TEXT:WEIGHT -> (TEXT, weight), and TEXT -> (TEXT, 1)."""
    rest, _, end = text.rpartition(":")
    try:
        return rest, float(end)
    except ValueError:
        return text, 1.0


def guide(text: str) -> tuple[str, str, float]:
    """NAME=FILE or NAME=FILE:SCALE -> (name, file, scale)."""
    argument, scale = split_weight(text)
    name, _, file = argument.partition("=")
    if not (name and file):
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=FILE or NAME=FILE:SCALE")
    return name, file, scale


def box(text: str) -> dict[str, Any]:
    """LABEL,X,Y,W,H as a request's box."""
    name, *numbers = text.rsplit(",", 4)
    try:
        x, y, w, h = map(float, numbers)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected LABEL,X,Y,W,H") from None
    return {"name": name, "x": x, "y": y, "w": w, "h": h}


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
    settings = with_models(settings_of(args, *ONE_SHOT), args)
    settings = replace(settings, lora=tuple(entry for entry, _ in args.lora))
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


def request_of(
    args: argparse.Namespace, kind: type[AnyRequest], files: Mapping[str, str], repeated: Mapping[str, Any]
) -> AnyRequest:
    """The request that the arguments describe. Raises InvalidRequest, or UsageError for a file.

    repeated: fields of an image that is made again; arguments take precedence.
    """
    fields: dict[str, Any] = {name: getattr(args, name, None) for name in REQUEST_FIELDS}
    fields["variation"] = variation_of(args)
    interval = getattr(args, "feature_cache", None)
    fields["feature_cache"] = None if interval is None else {"interval": interval}
    fields |= {"refiner": refiner_of(args), "hires": hires_of(args)}
    fields = dict(repeated) | {name: value for name, value in fields.items() if value is not None}
    if not repeated.get("loras"):  # else the image's own weights
        fields["loras"] = {entry.partition("=")[0]: weight for entry, weight in args.lora}
    fields |= guides_of(args)
    return build_request(kind, fields | {name: read(Path(file)) for name, file in files.items()})


def fields_from(
    args: argparse.Namespace, specs: Mapping[str, ModelSpec], settings: Settings
) -> dict[str, Any]:
    """The fields of the image given by --from. Raises UsageError and InvalidRequest."""
    fields = fields_of_file(read(Path(args.repeat)), specs, settings)
    if args.model:  # the model of this path, whatever it was called when the image was made
        fields.pop("model", None)
    return fields


def variation_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """The field `variation`; None if no strength is given. Raises UsageError for a seed without strength."""
    strength, seed = getattr(args, "variation_strength", None), getattr(args, "variation_seed", None)
    if strength is None and seed is not None:
        raise UsageError("--variation-seed has no effect without --variation-strength")
    return None if strength is None else {"strength": strength, "seed": -1 if seed is None else seed}


def guides_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields `controls` and `reference_images`, if there are any. Raises UsageError for a file."""
    fields: dict[str, Any] = {}
    if controls := getattr(args, "controls", []):
        how = {"preprocess": args.preprocess} if args.preprocess else {}
        fields["controls"] = [
            {"model": name, "image": read(Path(file)), "scale": scale, **how}
            for name, file, scale in controls
        ]
    if references := getattr(args, "references", []):
        fields["reference_images"] = [
            {"adapter": name, "image": read(Path(file)), "scale": scale} for name, file, scale in references
        ]
    return fields


def read(file: Path) -> bytes:
    """The content of a file. Raises UsageError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None


def write(file: Path, content: bytes) -> None:
    """Write a file. Raises UsageError if that is not possible."""
    try:
        file.write_bytes(content)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from None


def numbered(file: Path, index: int, n: int) -> Path:
    """FILE itself for one image; FILE-0, FILE-1, ... for several."""
    return file if n == 1 else file.with_stem(f"{file.stem}-{index}")


def with_used_adapters(settings: Settings, job: Job) -> Settings:
    """The settings without the controls and reference adapters that a job does not use."""
    names = {key.name for key in job.weights_keys if isinstance(key, AdapterKey)}

    def used(entries: Sequence[str]) -> tuple[str, ...]:
        return tuple(entry for entry in entries if entry.partition("=")[0] in names)

    return replace(
        settings,
        controlnet=used(settings.controlnet),
        reference_adapter=used(settings.reference_adapter),
    )


def with_names_of(vaes: Mapping[str, Path], used: Collection[str]) -> tuple[str, ...]:
    """The VAEs of models that are used, as settings name them."""
    return tuple(f"{model}={path}" for model, path in vaes.items() if model in used)


def run_job(job: Job, settings: Settings, sources: Mapping[str, Source]) -> Done:
    """Run one job on an engine in this process, with a progress bar. Raises the job's ServiceError."""
    from tqdm import tqdm

    from service.device.loading import build  # torch
    from service.engine.engine import Engine

    logging.basicConfig(format="ldm: %(message)s")
    logging.getLogger(build.__module__).setLevel(logging.INFO)  # to log the number of threads
    used = {key.model: sources[key.model] for key in job.model_keys}
    vaes = with_names_of(locate_vaes(settings.vae, sources), used)
    tiny = with_names_of(locate_vaes(settings.tiny_vae, sources, TINY_VAE), used)
    settings = replace(settings, vae=vaes, tiny_vae=tiny)
    settings = with_used_adapters(settings, job)
    runner = build(settings, used)
    results: list[Done | ServiceError] = []
    with tqdm(total=job.n * job.steps, unit="step", leave=False) as bar:

        def emit(event: Event) -> None:
            if isinstance(event, Started):
                bar.reset(event.steps)
            elif isinstance(event, Stepped):
                bar.update(next(each.steps for each in event.jobs if each.job == job.id) - bar.n)
            elif isinstance(event, Done):
                results.append(event)
            elif isinstance(event, Failed):
                results.append(from_code(event.code))

        engine = Engine(runner, emit, settings.max_rows, settings.decode_chunk, time.monotonic)
        engine.submit(job)
        while engine.busy:
            engine.tick()
    result = results[0]
    if isinstance(result, ServiceError):
        raise result
    return result

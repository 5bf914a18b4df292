"""`ldm train`: the command line that trains, exports and evaluates the bundled models."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from models.sampling.samplers import SAMPLERS
from models.training import commands
from models.training.presets import DEFAULTS


class Scale(NamedTuple):
    """Batch sizes and number of scenes that suit a device, as command-line arguments."""

    images: str  # per update of the autoencoder
    latents: str  # per update of the UNet
    scenes: str  # to draw and encode


SCALES = {"cpu": Scale("8", "24", "24576"), "cuda": Scale("64", "256", "262144")}
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Command = Callable[[argparse.Namespace], bool | None]
STATE = Path.home() / ".cache" / "latent-diffusion-service" / "train"


def main(argv: Sequence[str]) -> int:
    """Runs one part of the training; returns the exit code."""
    args = parser().parse_args(argv)
    args.command(args)
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all parts and their flags."""
    top = argparse.ArgumentParser(
        prog="ldm train",
        description="Train the bundled models on drawn images. A part that was interrupted resumes "
        "when it is called again.",
    )
    parts = top.add_subparsers(required=True, metavar="PART")
    for part in (*text_to_image_parts(parts), *upscaler_parts(parts), *adapter_parts(parts)):
        part.add_argument(
            "--state", type=Path, default=STATE, metavar="FOLDER", help="where runs keep their state"
        )
    evaluation_parts(parts)
    return top


def text_to_image_parts(parts: Subparsers) -> list[argparse.ArgumentParser]:
    """The parts that train and export the text-to-image model."""
    all_parts = add(parts, "all", train_all, "autoencoder, diffusion, export, evaluate and sheet in turn")
    all_parts.add_argument("--minutes", type=float, default=295, help="training time, over all resumed runs")
    add_stop(all_parts)
    add_names(all_parts)
    add_workers(all_parts)
    all_parts.add_argument("--count", type=int, default=600, help="as for evaluate")
    all_parts.add_argument("--steps", type=int, default=DEFAULTS.steps, help="as for evaluate and sheet")
    add_output(all_parts)
    autoencoder = add(
        parts, "autoencoder", commands.train_autoencoder, "the autoencoder, on drawn scenes of every glyph"
    )
    add_budget(autoencoder, minutes=25, learning_rate=1e-3, batch=8)
    autoencoder.add_argument("--start", type=Path, metavar="FOLDER", help="a trained model to start from")
    frozen = "freeze the encoder, so that a trained UNet still fits"
    autoencoder.add_argument("--only-decoder", action="store_true", help=frozen)
    add_workers(autoencoder)
    diffusion = add(
        parts,
        "diffusion",
        commands.train_diffusion,
        "the UNet and the text encoder, on latents",
    )
    add_budget(diffusion, minutes=90, learning_rate=6e-4, batch=24)
    add_names(diffusion)
    add_workers(diffusion)
    diffusion.add_argument("--scenes", type=int, default=24_576, help="scenes to draw and encode")
    diffusion.add_argument("--start", type=Path, metavar="FOLDER", help="a trained model to start from")
    export = add(parts, "export", commands.export_model, "write the trained model, in float16")
    add_output(export)
    replaced = "a trained model of which only the autoencoder is replaced"
    export.add_argument("--start", type=Path, metavar="FOLDER", help=replaced)
    add_names(export)
    return [all_parts, autoencoder, diffusion, export]


def upscaler_parts(parts: Subparsers) -> list[argparse.ArgumentParser]:
    """The parts that train and export the upscaler."""
    autoencoder = add(
        parts,
        "upscaler-autoencoder",
        commands.train_sharp_autoencoder,
        "the upscaler's autoencoder",
    )
    add_budget(autoencoder, minutes=15, learning_rate=1e-3, batch=32)
    unet = add(parts, "upscaler", commands.train_upscaler, "the upscaler's UNet, on latents")
    add_budget(unet, minutes=40, learning_rate=1e-3, batch=16)
    refine = add(
        parts, "refine-upscaler", commands.refine_upscaler, "the upscaler's UNet and decoder, on images"
    )
    add_budget(refine, minutes=60, learning_rate=2e-4, batch=6)
    refine.add_argument(
        "--start", type=Path, required=True, metavar="FOLDER", help="the upscaler to start from"
    )
    for part in (autoencoder, unet, refine):
        part.add_argument("--crops", type=int, default=10_240, help="images to draw, once for all parts")
    export = add(
        parts,
        "export-upscaler",
        commands.export_upscaler,
        "write the trained upscaler, in float16",
    )
    export.add_argument(
        "--start", type=Path, metavar="FOLDER", help="the upscaler that refine-upscaler started from"
    )
    add_output(export)
    return [autoencoder, unet, refine, export]


def adapter_parts(parts: Subparsers) -> list[argparse.ArgumentParser]:
    """The parts that train and export a ControlNet and a LoRA of the text-to-image model."""
    control = add(parts, "control", commands.train_control, "a ControlNet that reads outlines of objects")
    add_budget(control, minutes=50, learning_rate=5e-4, batch=24)
    control.add_argument("--scenes", type=int, default=8_192, help="scenes to draw and encode")
    few_steps = add(parts, "few-steps", commands.train_few_steps, "a LoRA for 4 steps without guidance")
    add_budget(few_steps, minutes=18, learning_rate=1.5e-3, batch=16)
    few_steps.add_argument("--paths", type=int, default=256, help="images to draw with guidance first")
    export_control = add(parts, "export-control", commands.export_control, "write the ControlNet, in float16")
    export_few_steps = add(parts, "export-few-steps", commands.export_few_steps, "write the LoRA, in float16")
    for part in (control, few_steps):
        part.add_argument("--names", type=Path, metavar="FILE", help="default: the model's names.txt")
    for part in (export_control, export_few_steps):
        add_output(part)
    trained = [control, few_steps, export_control, export_few_steps]
    for part in trained:
        part.add_argument("--start", type=Path, required=True, metavar="FOLDER", help="the model to adapt")
    return trained


def evaluation_parts(parts: Subparsers) -> None:
    """The parts that measure and show a trained model."""
    text = "measure the autoencoder's fidelity and the accuracy of every task"
    evaluate = add(parts, "evaluate", commands.evaluate, text)
    add_model(evaluate)
    count = "prompts of one object, and a third as many for every other task; for an upscaler, images"
    evaluate.add_argument("--count", type=int, default=600, help=count)
    sheet = add(parts, "sheet", commands.draw_sheets, "write a sheet of captioned images for each task")
    add_model(sheet)
    add_output(sheet)


def add(parts: Subparsers, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    """A part of the command line, with the flags that all parts share."""
    part = parts.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    part.set_defaults(command=command)
    return part


def add_budget(part: argparse.ArgumentParser, minutes: float, learning_rate: float, batch: int) -> None:
    part.add_argument("--minutes", type=float, default=minutes, help="training time, over all resumed runs")
    part.add_argument("--learning-rate", type=float, default=learning_rate, help="peak learning rate")
    part.add_argument("--batch", type=int, default=batch, help="images per update")
    add_stop(part)


def add_stop(part: argparse.ArgumentParser) -> None:
    text = "stop after this much training time; the same command resumes"
    part.add_argument("--stop-after", type=float, default=math.inf, metavar="MINUTES", help=text)


def add_workers(part: argparse.ArgumentParser) -> None:
    part.add_argument("--workers", type=int, default=1, help="processes that draw scenes")


def add_names(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "--names", type=Path, required=True, metavar="FILE", help="the names to learn, one per line"
    )


def add_output(part: argparse.ArgumentParser) -> None:
    part.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")


def add_model(part: argparse.ArgumentParser) -> None:
    part.add_argument("model", type=Path, metavar="FOLDER", help="a trained model")
    part.add_argument("--steps", type=int, help="default: the model's own")
    part.add_argument("--guidance-scale", type=float, default=DEFAULTS.guidance_scale)
    samplers = "of text-to-image models"
    part.add_argument("--sampler", choices=SAMPLERS, default="ddim", metavar="NAME", help=samplers)
    part.add_argument("--names", type=Path, metavar="FILE", help="default: the model's names.txt")
    part.add_argument("--lora", type=Path, metavar="FILE", help="a LoRA to add to the model")
    part.add_argument(
        "--control", type=Path, metavar="FOLDER", help="a ControlNet to measure or show instead"
    )
    part.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="float32")


def train_all(args: argparse.Namespace) -> None:
    """Runs all parts of the text-to-image model in turn, each as its own command line."""
    scale = SCALES[torch.device(args.device).type]
    state, model = ["--state", str(args.state)], str(args.output)
    names = ["--names", str(args.names)]
    updates = [*state, "--stop-after", str(args.stop_after), "--workers", str(args.workers)]
    for part in (
        ["autoencoder", *updates, *share(args, 0.2), "--batch", scale.images],
        [
            "diffusion",
            *updates,
            *share(args, 0.8),
            "--batch",
            scale.latents,
            "--scenes",
            scale.scenes,
            *names,
        ],
        ["export", *state, *names, "-o", model],
        ["evaluate", model, "--dtype", "auto", "--count", str(args.count), "--steps", str(args.steps)],
        ["sheet", model, "--dtype", "auto", "--steps", str(args.steps), "-o", f"{model}/sheets"],
    ):
        print("ldm train", *part, flush=True)
        called = parser().parse_args([*part, "--device", args.device])
        if called.command(called) is False:
            print("stopped; the same command resumes", flush=True)
            return


def share(args: argparse.Namespace, part: float) -> list[str]:
    """The --minutes of a part that gets this share of the whole time."""
    return ["--minutes", str(part * args.minutes)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The arguments of `ldm generate`, `inpaint` and `upscale`."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from models.spec import Spacing
from service.cli.options import RENDER, add_settings
from service.cli.phases import add_hires, add_phases
from service.requests.preprocessing import PREPROCESSORS
from service.settings import Given, parse


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
        metavar="NAME[=PATH][:WEIGHT]",
        type=lora,
        action="append",
        default=[],
        help="apply a LoRA, with weight 1 unless given; without PATH, that of --lora-dir; may be repeated",
    )
    add(
        "--from",
        dest="repeat",
        metavar="FILE",
        help="repeat the request whose parameters this image file contains; other arguments take precedence",
    )
    add_settings(command, *RENDER)


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
    """NAME=PATH or NAME, and possibly :WEIGHT -> (NAME=PATH or NAME, weight)."""
    argument, weight = split_weight(text)
    if argument and "=" not in argument:
        return argument, weight
    try:
        (entry,) = parse("lora", Given(argument, "--lora", "the command line"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=PATH, or a NAME of --lora-dir") from None
    return entry, weight


def guide(text: str) -> tuple[str, str, float]:
    """NAME=FILE or NAME=FILE:SCALE -> (name, file, scale)."""
    argument, scale = split_weight(text)
    name, _, file = argument.partition("=")
    if not (name and file):
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=FILE or NAME=FILE:SCALE")
    return name, file, scale


def split_weight(text: str) -> tuple[str, float]:
    """TEXT:WEIGHT -> (TEXT, weight), and TEXT -> (TEXT, 1)."""
    rest, _, end = text.rpartition(":")
    try:
        return rest, float(end)
    except ValueError:
        return text, 1.0


def box(text: str) -> dict[str, Any]:
    """LABEL,X,Y,W,H as a request's box."""
    name, *numbers = text.rsplit(",", 4)
    try:
        x, y, w, h = map(float, numbers)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected LABEL,X,Y,W,H") from None
    return {"name": name, "x": x, "y": y, "w": w, "h": h}

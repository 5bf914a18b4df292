"""`ldm train`: autoencoders, the diffusion models on their latents, the folders, and the measure."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models import checkpoint
from models.latent_diffusion import LatentDiffusion
from models.networks.autoencoder import Autoencoder
from models.spec import AutoencoderSpec
from models.training.presets import AUTOENCODER, DEFAULTS, SHARP_AUTOENCODER, TOKENS
from models.training.trainer import Budget
from models.training.vocabulary import build_tokenizer


class Scale(NamedTuple):
    """How much at once: pictures and latents of an update, and latents to draw."""

    pictures: str
    latents: str
    scenes: str


SCALES = {"cpu": Scale("8", "24", "24576"), "cuda": Scale("64", "256", "262144")}
SHARD = 15 * 2**20  # bytes of a file of weights: hosts and machines refuse large ones
STATE = Path.home() / ".cache" / "latent-diffusion-service" / "train"


def main(argv: Sequence[str]) -> int:
    """Run a part of the training; returns the exit code."""
    args = parser().parse_args(argv)
    args.command(args)
    return 0


def parser() -> argparse.ArgumentParser:
    """All parts and their flags."""
    top = argparse.ArgumentParser(
        prog="ldm train",
        description="Train the models in the box on drawn pictures. A part that is stopped goes on "
        "from its state when it is called again.",
    )
    parts = top.add_subparsers(required=True, metavar="PART")
    every = add(parts, "all", train_all, "the next two, export, evaluate and sheet in turn")
    every.add_argument("--minutes", type=float, default=295, help="of updates, over all resumed parts")
    add_stop(every)
    add_names(every)
    add_workers(every)
    every.add_argument("--count", type=int, default=600, help="as of evaluate")
    every.add_argument("--steps", type=int, default=DEFAULTS.steps, help="as of evaluate and sheet")
    every.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    first = add(parts, "autoencoder", train_autoencoder, "E and D on drawn scenes of every glyph")
    add_budget(first, minutes=25, learning_rate=1e-3, batch=8)
    first.add_argument("--start", type=Path, metavar="FOLDER", help="a trained model to go on from")
    first.add_argument(
        "--only-decoder", action="store_true", help="leave E, and with it what a UNet has learned, as it is"
    )
    add_workers(first)
    diffusion = add(parts, "diffusion", train_diffusion, "the UNet and the text encoder on latents of E")
    add_budget(diffusion, minutes=90, learning_rate=6e-4, batch=24)
    add_names(diffusion)
    add_workers(diffusion)
    diffusion.add_argument(
        "--scenes", type=int, default=24_576, help="latents to draw (default: %(default)s)"
    )
    diffusion.add_argument("--start", type=Path, metavar="FOLDER", help="a trained model to go on from")
    sharp = add(parts, "upscaler-autoencoder", train_sharp_autoencoder, "E and D of the upscaler, on crops")
    add_budget(sharp, minutes=15, learning_rate=1e-3, batch=32)
    upscaler = add(parts, "upscaler", train_upscaler, "the upscaler's UNet on latents of that E")
    add_budget(upscaler, minutes=40, learning_rate=1e-3, batch=16)
    for part in (sharp, upscaler):
        part.add_argument(
            "--crops", type=int, default=10_240, help="pictures to draw, once for both (default: %(default)s)"
        )
    export_upscaler = add(parts, "export-upscaler", export_upscaling, "the upscaler as a folder in float16")
    export_upscaler.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    export = add(parts, "export", export_model, "the trained weights as a folder in float16")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    export.add_argument(
        "--start", type=Path, metavar="FOLDER", help="a trained model of which D alone is another now"
    )
    add_names(export)
    measure = add(parts, "evaluate", evaluate, "the autoencoder's fidelity, and accuracy in every task")
    add_model(measure)
    measure.add_argument(
        "--count",
        type=int,
        default=600,
        help="prompts of one object, a third of it a task; or pictures of an upscaler",
    )
    measure.add_argument("--steps", type=int, help="default: the model's")
    measure.add_argument("--guidance-scale", type=float, default=DEFAULTS.guidance_scale)
    pictures = add(parts, "sheet", draw_sheets, "a sheet of captioned pictures for each task")
    add_model(pictures)
    pictures.add_argument("--steps", type=int, help="default: the model's")
    pictures.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    for part in (every, first, diffusion, export, sharp, upscaler, export_upscaler):
        part.add_argument(
            "--state", type=Path, default=STATE, metavar="FOLDER", help="where a run's state is kept"
        )
    return top


def add(parts, name: str, command, text: str) -> argparse.ArgumentParser:
    """A part, with the flags that all share."""
    part = parts.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    part.set_defaults(command=command)
    return part


def add_budget(part: argparse.ArgumentParser, minutes: float, learning_rate: float, batch: int) -> None:
    part.add_argument("--minutes", type=float, default=minutes, help="of updates, over all resumed parts")
    part.add_argument("--learning-rate", type=float, default=learning_rate, help="at its peak")
    part.add_argument("--batch", type=int, default=batch, help="pictures an update")
    add_stop(part)


def add_stop(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "--stop-after", type=float, default=math.inf, metavar="MINUTES", help="of updates in this call; the "
        "next one goes on",
    )  # fmt: skip


def add_workers(part: argparse.ArgumentParser) -> None:
    part.add_argument("--workers", type=int, default=1, help="processes that draw")


def add_names(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "--names", type=Path, required=True, metavar="FILE", help="the names to learn, one a line"
    )


def add_model(part: argparse.ArgumentParser) -> None:
    part.add_argument("model", type=Path, metavar="FOLDER", help="a trained model")
    part.add_argument("--names", type=Path, metavar="FILE", help="default: names.txt of the model")
    part.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def budget_of(args: argparse.Namespace) -> Budget:
    return Budget(args.minutes, args.learning_rate, args.batch, stop_after=args.stop_after)


def read_names(file: Path) -> list[str]:
    """The lines of a file of names."""
    return file.read_text(encoding="utf-8").split("\n")[:-1]


def train_all(args: argparse.Namespace) -> None:
    """Every part of the box's first model in turn, each called as a user would call it."""
    scale = SCALES[torch.device(args.device).type]
    state, model = ["--state", str(args.state)], str(args.output)
    names = ["--names", str(args.names)]
    updates = [*state, "--stop-after", str(args.stop_after), "--workers", str(args.workers)]
    for part in (
        ["autoencoder", *updates, *share(args, 0.2), "--batch", scale.pictures],
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
        ["evaluate", model, "--dtype", "bfloat16", "--count", str(args.count), "--steps", str(args.steps)],
        ["sheet", model, "--dtype", "bfloat16", "--steps", str(args.steps), "-o", f"{model}/sheets"],
    ):
        print("ldm train", *part, flush=True)
        called = parser().parse_args([*part, "--device", args.device])
        if called.command(called) is False:
            print("stopped; the same command goes on", flush=True)
            return


def share(args: argparse.Namespace, part: float) -> list[str]:
    """A part of all minutes."""
    return ["--minutes", str(part * args.minutes)]


def train_autoencoder(args: argparse.Namespace) -> bool:
    from models.training import first_stage

    autoencoder = Autoencoder(AUTOENCODER)
    if args.start:
        autoencoder.load_state_dict(checkpoint.load(args.start).autoencoder.state_dict())
    state, device = args.state / "autoencoder.pt", torch.device(args.device)
    return first_stage.train(autoencoder, budget_of(args), state, device, args.only_decoder, args.workers)


def train_diffusion(args: argparse.Namespace) -> bool:
    from models.training import diffusion
    from models.training.presets import LAYOUT, SCHEDULE, UNET, text_spec

    device = torch.device(args.device)
    names, tokenizer = read_names(args.names), build_tokenizer(TOKENS)
    network = diffusion.SceneNetwork(UNET, text_spec(tokenizer), LAYOUT, tokenizer)
    if args.start:
        diffusion.start_from(network, checkpoint.load(args.start))
    autoencoder = trained(AUTOENCODER, args.state / "autoencoder.pt").to(device)
    data = cached(
        args.state / "latents.pt",
        lambda: diffusion.draw_latents(
            autoencoder, network.text_encoder, names, args.scenes, 1, device, args.workers
        ),
    )
    scale = scale_factor(data["latents"])
    state = args.state / "diffusion.pt"
    return diffusion.train(network, SCHEDULE, data, scale, budget_of(args), state, device)


def export_model(args: argparse.Namespace) -> None:
    bundle = with_decoder(args) if args.start else trained_model(args)
    checkpoint.save(bundle, args.output, shard=SHARD)
    shutil.copyfile(args.names, args.output / "names.txt")


def with_decoder(args: argparse.Namespace) -> LatentDiffusion:
    """A model that was there, with E and D of `autoencoder --only-decoder`."""
    bundle = checkpoint.load(args.start)
    bundle.autoencoder.load_state_dict(averaged(args.state / "autoencoder.pt"))
    return bundle


def trained_model(args: argparse.Namespace) -> LatentDiffusion:
    """All networks of finished runs."""
    from models.conditioning.conditioner import TextConditioner
    from models.training.diffusion import SceneNetwork
    from models.training.presets import LAYOUT, UNET, model_spec, text_spec

    tokenizer = build_tokenizer(TOKENS)
    text = text_spec(tokenizer)
    network = SceneNetwork(UNET, text, LAYOUT, tokenizer)
    network.load_state_dict(averaged(args.state / "diffusion.pt"))
    scale = scale_factor(torch.load(args.state / "latents.pt", weights_only=True)["latents"])
    names = read_names(args.names)
    spec = model_spec(args.output.resolve().name, text, scale, names)
    conditioner = TextConditioner([network.text_encoder], network.layout, names)
    autoencoder = trained(AUTOENCODER, args.state / "autoencoder.pt")
    return LatentDiffusion(spec, network.unet, autoencoder, conditioner)


def train_sharp_autoencoder(args: argparse.Namespace) -> None:
    from models.training import upscaler

    crops, state = drawn_crops(args), args.state / "sharp_autoencoder.pt"
    upscaler.train_first_stage(SHARP_AUTOENCODER, crops, budget_of(args), state, torch.device(args.device))


def drawn_crops(args: argparse.Namespace) -> Tensor:
    """Of this run or an earlier one."""
    from models.training.upscaler import draw_crops

    return cached(args.state / "crops.pt", lambda: {"crops": draw_crops(args.crops, seed=1)})["crops"]


def train_upscaler(args: argparse.Namespace) -> None:
    from models.training import upscaler
    from models.training.presets import SCHEDULE, UPSCALER, UPSCALING

    device = torch.device(args.device)
    autoencoder = trained(SHARP_AUTOENCODER, args.state / "sharp_autoencoder.pt").to(device)
    data = cached(
        args.state / "sharp_latents.pt",
        lambda: upscaler.encode_crops(autoencoder, drawn_crops(args), seed=2, device=device),
    )
    scale, state = scale_factor(upscaler.residuals(autoencoder, data)), args.state / "upscaler.pt"
    upscaler.train(UPSCALER, UPSCALING, SCHEDULE, data, autoencoder, scale, budget_of(args), state, device)


def export_upscaling(args: argparse.Namespace) -> None:
    from models.networks.unet import UNet
    from models.training.presets import UPSCALER, upscaler_spec
    from models.training.upscaler import residuals

    unet = UNet(UPSCALER)
    unet.load_state_dict(averaged(args.state / "upscaler.pt"))
    autoencoder = trained(SHARP_AUTOENCODER, args.state / "sharp_autoencoder.pt")
    data = torch.load(args.state / "sharp_latents.pt", weights_only=True)
    scale = scale_factor(residuals(autoencoder, data))
    spec = upscaler_spec(args.output.resolve().name, scale)
    checkpoint.save(LatentDiffusion(spec, unet, autoencoder, None), args.output, shard=SHARD)


def trained(spec: AutoencoderSpec, state: Path) -> Autoencoder:
    """E and D of a finished run."""
    autoencoder = Autoencoder(spec).requires_grad_(False).eval()
    autoencoder.load_state_dict(averaged(state))
    return autoencoder


def averaged(state: Path) -> dict[str, Tensor]:
    """The averaged weights in a state file."""
    return torch.load(state, map_location="cpu", weights_only=True)["averaged"]


def scale_factor(latents: Tensor) -> float:
    """What makes the latents' standard deviation 1 (section D.1), to four digits."""
    return float(f"{1 / latents.float().std().item():.4g}")


def cached(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What make() returned, now or in an earlier run."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), file)
    return torch.load(file, weights_only=True)


def evaluate(args: argparse.Namespace) -> None:
    from models.training import evaluate, evaluate_upscaler

    bundle = loaded(args)
    if "upscaling" in bundle.spec.tasks:
        lines = evaluate_upscaler.report(bundle, args.count, args.steps or bundle.spec.defaults.steps)
    else:
        steps, scale = args.steps or DEFAULTS.steps, args.guidance_scale
        lines = evaluate.report(bundle, names_of(args), args.count, steps, scale)
    for line in lines:
        print(line, flush=True)


def draw_sheets(args: argparse.Namespace) -> None:
    from models.training import evaluate_upscaler, sheet

    args.output.mkdir(parents=True, exist_ok=True)
    bundle = loaded(args)
    steps = args.steps or bundle.spec.defaults.steps
    if "upscaling" in bundle.spec.tasks:
        made = evaluate_upscaler.sheets(bundle, steps)
    else:
        made = sheet.sheets(bundle, names_of(args), steps)
    for task, picture in made:
        picture.save(args.output / f"{task}.png", optimize=True)


def loaded(args: argparse.Namespace) -> LatentDiffusion:
    """The model of the arguments."""
    return checkpoint.load(args.model, args.device, getattr(torch, args.dtype))


def names_of(args: argparse.Namespace) -> list[str]:
    """What the model claims to draw."""
    return read_names(args.names or args.model / "names.txt")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

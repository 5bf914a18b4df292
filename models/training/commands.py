"""The parts of `ldm train`: one function per part, called with its parsed arguments.

Modules that one part needs are imported in its function, because some take seconds to import.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models import checkpoint
from models.dtypes import choose_dtype
from models.latent_diffusion import LatentDiffusion
from models.networks.autoencoder import Autoencoder
from models.networks.control_net import ControlNet
from models.spec import AutoencoderSpec
from models.training.presets import AUTOENCODER, DEFAULTS, SHARP_AUTOENCODER, TOKENS
from models.training.trainer import Budget
from models.training.vocabulary import build_tokenizer

MAX_FILE_BYTES = 15 * 2**20  # of a weight file; some hosts refuse larger ones


def budget_of(args: argparse.Namespace) -> Budget:
    return Budget(args.minutes, args.learning_rate, args.batch, stop_after=args.stop_after)


def read_names(file: Path) -> list[str]:
    """The names in a file, one per line."""
    return file.read_text(encoding="utf-8").split("\n")[:-1]


def train_autoencoder(args: argparse.Namespace) -> bool:
    from models.training import first_stage

    device = torch.device(args.device)
    kept = checkpoint.load(args.start, device).autoencoder.requires_grad_(False) if args.start else None
    autoencoder = Autoencoder(kept.spec if kept and args.only_decoder else AUTOENCODER).to(device)
    if kept:
        first_stage.widen(autoencoder, kept)
    state = args.state / "autoencoder.pt"
    return first_stage.train(
        autoencoder, budget_of(args), state, device, args.only_decoder, args.workers, kept
    )


def train_diffusion(args: argparse.Namespace) -> bool:
    from models.training import diffusion
    from models.training.presets import LAYOUT_CHANNELS, SCHEDULE, UNET, text_spec

    device = torch.device(args.device)
    names, tokenizer = read_names(args.names), build_tokenizer(TOKENS)
    network = diffusion.SceneNetwork(UNET, text_spec(tokenizer), LAYOUT_CHANNELS, tokenizer)
    started = checkpoint.load(args.start) if args.start else None
    if started:
        diffusion.start_from(network, started)
    kept = started.spec.autoencoder.latent_channels if started else AUTOENCODER.latent_channels

    def draw() -> dict[str, Tensor]:
        autoencoder, encoder = (
            trained(AUTOENCODER, args.state / "autoencoder.pt").to(device),
            network.text_encoder,
        )
        data = diffusion.draw_latents(autoencoder, encoder, names, args.scenes, 1, device, args.workers)
        # The first channels keep their scale; new ones hold detail, which is smaller.
        return data | {"scale": torch.tensor(scale_factor(data["latents"][:, :kept]))}

    data, state = cached(args.state / "latents.pt", draw), args.state / "diffusion.pt"
    scale = data["scale"].item()
    return diffusion.train(network, SCHEDULE, data, scale, budget_of(args), state, device)


def export_model(args: argparse.Namespace) -> None:
    model = with_decoder(args) if args.start else trained_model(args)
    checkpoint.save(model, args.output, shard=MAX_FILE_BYTES)
    shutil.copyfile(args.names, args.output / "names.txt")


def with_decoder(args: argparse.Namespace) -> LatentDiffusion:
    """The model of --start, with the autoencoder trained by `autoencoder --only-decoder`."""
    model = checkpoint.load(args.start)
    model.autoencoder.load_state_dict(averaged(args.state / "autoencoder.pt"))
    return model


def trained_model(args: argparse.Namespace) -> LatentDiffusion:
    """The model that the finished runs of all parts make up."""
    from models.conditioning.conditioner import TextConditioner
    from models.training.diffusion import SceneNetwork
    from models.training.presets import LAYOUT_CHANNELS, UNET, model_spec, text_spec

    tokenizer = build_tokenizer(TOKENS)
    text = text_spec(tokenizer)
    network = SceneNetwork(UNET, text, LAYOUT_CHANNELS, tokenizer)
    network.load_state_dict(averaged(args.state / "diffusion.pt"))
    scale = torch.load(args.state / "latents.pt", weights_only=True)["scale"].item()
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
    """Sharp images (N, 128, 128, 3) uint8, drawn now or by an earlier run."""
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


def refine_upscaler(args: argparse.Namespace) -> bool:
    from models.training import upscaler_refinement as refinement

    crops, model = drawn_crops(args), checkpoint.load(args.start)
    file = args.state / "low.pt"
    low = cached(file, lambda: {"low": refinement.degrade_crops(crops, seed=3)})["low"]
    state, device = args.state / "refinement.pt", torch.device(args.device)
    return refinement.train(model, crops, low, budget_of(args), state, device)


def refined_upscaler(args: argparse.Namespace) -> LatentDiffusion:
    """The upscaler of --start, with the weights trained by `refine-upscaler`."""
    from models.training.upscaler_refinement import Network

    model = checkpoint.load(args.start)
    Network(model).load_state_dict(averaged(args.state / "refinement.pt"))
    return model


def export_upscaler(args: argparse.Namespace) -> None:
    model = refined_upscaler(args) if args.start else trained_upscaler(args)
    checkpoint.save(model, args.output, shard=MAX_FILE_BYTES)


def trained_upscaler(args: argparse.Namespace) -> LatentDiffusion:
    """The upscaler that the finished runs of both parts make up."""
    from models.networks.unet import UNet
    from models.training.presets import UPSCALER, upscaler_spec
    from models.training.upscaler import residuals

    unet = UNet(UPSCALER)
    unet.load_state_dict(averaged(args.state / "upscaler.pt"))
    autoencoder = trained(SHARP_AUTOENCODER, args.state / "sharp_autoencoder.pt")
    data = torch.load(args.state / "sharp_latents.pt", weights_only=True)
    scale = scale_factor(residuals(autoencoder, data))
    spec = upscaler_spec(args.output.resolve().name, scale)
    return LatentDiffusion(spec, unet, autoencoder, None)


def train_control(args: argparse.Namespace) -> bool:
    from models.training import control

    device = torch.device(args.device)
    model = checkpoint.load(args.start, device)
    names = read_names(args.names or args.start / "names.txt")
    data = cached(
        args.state / "control_scenes.pt", lambda: control.draw_data(model, names, args.scenes, 4, device)
    )
    return control.train(model, data, budget_of(args), args.state / "control.pt", device)


def export_control(args: argparse.Namespace) -> None:
    from models.adapters.control_net import save_control
    from models.training.control import control_spec

    spec = checkpoint.read_spec(args.start)
    network = ControlNet(control_spec(spec.unet_spec, spec.autoencoder.latent_channels))
    network.load_state_dict(averaged(args.state / "control.pt"))
    save_control(network, args.output)


def train_few_steps(args: argparse.Namespace) -> bool:
    from models.training import few_steps

    device = torch.device(args.device)
    model = checkpoint.load(args.start, device)
    names = read_names(args.names or args.start / "names.txt")
    scale = model.spec.defaults.guidance_scale
    data = cached(
        args.state / "paths.pt", lambda: few_steps.draw_paths(model, names, args.paths, scale, seed=5)
    )
    return few_steps.train(model, data, budget_of(args), args.state / "few_steps.pt", device)


def export_few_steps(args: argparse.Namespace) -> None:
    from models.training import few_steps
    from models.training.diffusion import networks_of

    unet, _ = networks_of(checkpoint.load(args.start))
    low_rank = few_steps.LowRank(unet)
    low_rank.load_state_dict(averaged(args.state / "few_steps.pt"))
    few_steps.save(low_rank, unet, args.output)


def trained(spec: AutoencoderSpec, state: Path) -> Autoencoder:
    """The autoencoder of a finished run."""
    autoencoder = Autoencoder(spec).requires_grad_(False).eval()
    autoencoder.load_state_dict(averaged(state))
    return autoencoder


def averaged(state: Path) -> dict[str, Tensor]:
    """The averaged weights in a state file."""
    weights: dict[str, Tensor] = torch.load(state, map_location="cpu", weights_only=True)["averaged"]
    return weights


def scale_factor(latents: Tensor) -> float:
    """The factor that gives latents a standard deviation of 1, rounded to four digits.

    Rombach et al. 2021, appendix D.1.
    """
    return float(f"{1 / latents.float().std().item():.4g}")


def cached(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in a file, which is first written with the result of make() if it is missing."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), file)
    data: dict[str, Tensor] = torch.load(file, weights_only=True)
    return data


def evaluate(args: argparse.Namespace) -> None:
    from models.training import evaluate, evaluate_control, evaluate_upscaler

    model = loaded(args)
    if args.control:
        control, steps = control_of(args, model), args.steps or model.spec.defaults.steps
        lines = evaluate_control.report(model, control, names_of(args), args.count, steps)
    elif "upscaling" in model.spec.tasks:
        lines = evaluate_upscaler.report(model, args.count, args.steps or model.spec.defaults.steps)
    else:
        steps, scale = args.steps or DEFAULTS.steps, args.guidance_scale
        lines = evaluate.report(model, names_of(args), args.count, steps, scale, args.sampler)
    for line in lines:
        print(line, flush=True)


def draw_sheets(args: argparse.Namespace) -> None:
    from models.training import evaluate_control, evaluate_upscaler, sheet

    args.output.mkdir(parents=True, exist_ok=True)
    model = loaded(args)
    steps = args.steps or model.spec.defaults.steps
    if args.control:
        drawn = evaluate_control.sheets(model, control_of(args, model), names_of(args), steps)
    elif "upscaling" in model.spec.tasks:
        drawn = evaluate_upscaler.sheets(model, steps)
    else:
        drawn = sheet.sheets(model, names_of(args), steps, args.guidance_scale, args.sampler)
    for task, image in drawn:
        image.save(args.output / f"{task}.png", optimize=True)


def loaded(args: argparse.Namespace) -> LatentDiffusion:
    """The model that the arguments name, with the LoRA of --lora."""
    from models.adapters import lora

    model = checkpoint.load(args.model, args.device, choose_dtype(args.dtype, torch.device(args.device)))
    if not args.lora:
        return model
    opened = lora.open_loras({"lora": args.lora}, {"model": model.spec}, args.device)["model"]["lora"]
    return lora.apply(model, [(opened, 1.0, 1.0)])


def control_of(args: argparse.Namespace, model: LatentDiffusion) -> ControlNet:
    """The ControlNet that --control names."""
    from models.adapters.control_net import open_control

    network = open_control(
        args.control, model.spec, args.device, choose_dtype(args.dtype, torch.device(args.device))
    ).network
    assert isinstance(network, ControlNet)
    return network


def names_of(args: argparse.Namespace) -> list[str]:
    """The names that the model was trained on, from --names or the model's names.txt."""
    return read_names(args.names or args.model / "names.txt")

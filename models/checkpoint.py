"""Checkpoints: a diffusers folder or a single CompVis file, read safely and loaded strictly.

Folders are written again.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPTokenizer

from models import keymaps, zoo
from models.autoencoder import Autoencoder
from models.conditioner import LayoutProjection, TextConditioner, TokenConditioner, make_conditioner
from models.configs import CheckpointError, autoencoder_folder, read_spec, write_configs
from models.latent_diffusion import LatentDiffusion
from models.schedule import Schedule
from models.spec import ModelSpec, TextSpec, TokenSpec
from models.text_encoder import TextEncoder
from models.unet import UNet

__all__ = ["CheckpointError", "load", "read_spec", "save"]

NETWORK_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
TEXT_FILES = ("model.safetensors", "model.fp16.safetensors")
PICKLES = {NETWORK_FILES: "diffusion_pytorch_model.bin", TEXT_FILES: "pytorch_model.bin"}
SHOWN = 4  # keys named in an error, of however many


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> LatentDiffusion:
    """The model in a diffusers folder or in a single file, ready to run.

    allow_pickle: read .bin files where there is no safetensors file, and .ckpt files; they never run code
    even then. Never touches the network. Raises CheckpointError with what is missing, unexpected, misshaped
    or unreadable.
    """
    path = Path(path)
    if path.is_file():
        return load_file(path, device, dtype, allow_pickle)
    spec = read_spec(path)
    with torch.device("meta"):  # no memory and no initial values: every parameter comes from the file
        unet, autoencoder = UNet(spec.unet), Autoencoder(spec.autoencoder)
    assign(unet, unet_names(unet), read_network(path / "unet", NETWORK_FILES, allow_pickle), dtype)
    tensors = read_autoencoder(autoencoder_folder(path), allow_pickle)
    assign(autoencoder, autoencoder_names(autoencoder), tensors, dtype)
    conditioner = read_conditioner(spec, path, dtype, allow_pickle) if spec.text else None
    for network in filter(None, (unet, autoencoder, conditioner)):
        network.requires_grad_(False).eval()
    return LatentDiffusion(spec, unet, autoencoder, conditioner).to(device)


def read_conditioner(spec: ModelSpec, path: Path, dtype: torch.dtype, allow_pickle: bool) -> TextConditioner:
    """A folder's text encoder with its tokenizer, and what makes channels of labels."""
    tokenizer = read_tokenizer(path / "tokenizer", spec.text)
    with torch.device("meta"):
        text = TextEncoder(spec.text, tokenizer)
    assign(text.transformer, text_names(text), read_text(path / "text_encoder", allow_pickle), dtype)
    restore_positions(text)
    return TextConditioner(text, read_layout(spec, path, dtype, allow_pickle), spec.labels)


def load_file(
    file: Path, device: torch.device | str, dtype: torch.dtype, allow_pickle: bool
) -> LatentDiffusion:
    """The model in a single file of the CompVis layout: one of the paper's, or a first stage alone."""
    tensors = read_single(file, allow_pickle)
    spec = recognise(tensors, file)
    with torch.device("meta"):
        unet = UNet(spec.unet) if spec.unet else None
        autoencoder, conditioner = Autoencoder(spec.autoencoder), make_conditioner(spec.condition)
    weights = {key: value for key, value in tensors.items() if not keymaps.is_ignored(key)}
    if unet:
        weights = with_averages(without_copy(weights), unet)
    parts = ((zoo.UNET, unet), (zoo.CONDITION, conditioner), (zoo.FIRST_STAGE if unet else "", autoencoder))
    for prefix, network in parts:
        if network:
            own = {key: weights.pop(key) for key in list(weights) if key.startswith(prefix)}
            assign(network, {key: prefix + key for key in network.state_dict()}, own, dtype)
            network.requires_grad_(False).eval()
    if weights:
        raise CheckpointError(f"{file}: {listed('unexpected', list(weights))}")
    if isinstance(conditioner, TokenConditioner) and (file.parent / "vocab.txt").is_file():
        conditioner.tokenizer = read_words(file.parent / "vocab.txt", spec.condition)
    return LatentDiffusion(spec, unet, autoencoder, conditioner).to(device)


def recognise(tensors: Mapping[str, Tensor], file: Path) -> ModelSpec:
    """What the model in a single file is, with the betas and the factor of latents that it holds, if any."""
    betas, scale = tensors.get("betas"), tensors.get("scale_factor")
    spec = zoo.recognise(
        {key: tuple(value.shape) for key, value in tensors.items()},
        file.stem,
        None if betas is None else ends_of(betas),
        None if scale is None else float(scale),
    )
    expected = torch.from_numpy(Schedule(spec.schedule).betas)
    if betas is not None and not (
        betas.shape == expected.shape and torch.allclose(betas.double(), expected, rtol=1e-4)
    ):
        raise CheckpointError(f"{file}: its betas are not {len(expected)} whose roots are evenly spaced")
    return spec


def ends_of(betas: Tensor) -> tuple[float, float]:
    """The first and last beta of a file, to seven digits: its numbers are float32."""
    first, *_, last = betas.flatten().tolist()
    return float(f"{first:.6e}"), float(f"{last:.6e}")


def with_averages(tensors: dict[str, Tensor], unet: UNet) -> dict[str, Tensor]:
    """The UNet's averaged weights in the place of the last ones, where the file has any: then all."""
    names = {zoo.UNET + key: keymaps.averaged(zoo.UNET + key) for key in unet.state_dict()}
    averages = {key: value for key, value in tensors.items() if key.startswith(keymaps.EMA)}
    if not averages:
        return tensors
    refuse("missing", [name for name in names.values() if name not in averages], unet)
    refuse("unexpected", list(averages.keys() - set(names.values())), unet)
    rest = {key: value for key, value in tensors.items() if key not in averages}
    return rest | {key: averages[name] for key, name in names.items()}


def without_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the first stage's second copy, which models of masked pictures hold as their conditioner."""
    copies = {
        key: zoo.FIRST_STAGE + key.removeprefix(zoo.CONDITION)
        for key in tensors
        if key.startswith(zoo.CONDITION) and zoo.CONDITION + "encoder.conv_in.weight" in tensors
    }
    for copy, key in copies.items():
        if key not in tensors or not torch.equal(tensors[copy], tensors[key]):
            raise CheckpointError(f"{copy} differs from {key}: the conditioner is another first stage")
    return {key: value for key, value in tensors.items() if key not in copies}


def read_single(file: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """Every tensor of a single file."""
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if not allow_pickle:
        raise CheckpointError(f"{file} is not a .safetensors file; pickled weights need allow_pickle")
    return read_pickle(file)


def read_words(file: Path, spec: TokenSpec) -> BertTokenizer:
    """BERT's words, whose ids must all have a row in the embedding."""
    try:
        tokenizer = BertTokenizer.from_pretrained(file.parent, local_files_only=True)
    except Exception as error:  # transformers raises whatever the bytes led it to
        raise CheckpointError(f"{file} cannot be read as BERT's vocabulary: {error}") from error
    if len(tokenizer) > spec.vocabulary:
        raise CheckpointError(f"{file} has {len(tokenizer)} tokens, the text encoder {spec.vocabulary}")
    return tokenizer


def read_layout(
    spec: ModelSpec, path: Path, dtype: torch.dtype, allow_pickle: bool
) -> LayoutProjection | None:
    """What makes channels of labels, where the UNet takes them."""
    if not spec.layout_channels:
        return None
    with torch.device("meta"):
        layout = LayoutProjection(spec.text.width, spec.layout_channels)
    tensors = read_network(path / "layout", NETWORK_FILES, allow_pickle)
    assign(layout, {key: key for key in layout.state_dict()}, tensors, dtype)
    return layout


def save(bundle: LatentDiffusion, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a bundle as a diffusers folder that diffusers itself can load, weights in `dtype`.

    Raises CheckpointError for a value that dtype cannot hold, or a shape the layout has no words for.
    """
    path = Path(path)
    check_writable(bundle)
    write_configs(bundle.spec, path)
    folder, conditioner = autoencoder_folder(path), bundle.conditioner
    write_tensors(named(bundle.unet, unet_names), path / "unet" / NETWORK_FILES[0], dtype)
    write_tensors(named(bundle.autoencoder, autoencoder_names), folder / NETWORK_FILES[0], dtype)
    if not conditioner:
        return
    text = conditioner.encoder
    text.tokenizer.save_pretrained(path / "tokenizer")
    names = {key: keymaps.TEXT_PREFIX + name for key, name in text_names(text).items()}  # published with it
    tensors = {names[key]: value for key, value in text.transformer.state_dict().items()}
    write_tensors(tensors, path / "text_encoder" / TEXT_FILES[0], dtype)
    if conditioner.layout:
        write_tensors(conditioner.layout.state_dict(), path / "layout" / NETWORK_FILES[0], dtype)


def check_writable(bundle: LatentDiffusion) -> None:
    """Raise CheckpointError for a model that the layout has no words for."""
    unet, autoencoder, conditioner = bundle.spec.unet, bundle.spec.autoencoder, bundle.conditioner
    texts = isinstance(conditioner, TextConditioner) and unet and unet.context_width
    if not texts and (conditioner or not bundle.spec.upscaling):
        raise CheckpointError("this layout holds models with CLIP's text encoder, and upscalers without text")
    if unet.residual_resampling or unet.scale_shift_norm:
        raise CheckpointError("this layout cannot say how the UNet resamples or norms")
    if autoencoder.codes or autoencoder.attention_levels:
        raise CheckpointError("this layout holds KL autoencoders with attention in the middle only")


def named(network: nn.Module, names_of: Callable[[nn.Module], dict[str, str]]) -> dict[str, Tensor]:
    """A network's tensors under their names in the file."""
    names = names_of(network)
    return {names[key]: value for key, value in network.state_dict().items()}


def write_tensors(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype) -> None:
    """Attention matrices of the autoencoder lose their two trailing axes of 1: the layout has them linear."""
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.flatten(1) if is_linear(name) and tensor.dim() == 4 else tensor
        # Not even a view may share memory with another tensor in the file.
        out[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if not torch.isfinite(out[name]).all():
            raise CheckpointError(f"{name} has values that {dtype} cannot hold")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(out, file, metadata={"format": "pt"})


def is_linear(name: str) -> bool:
    return name in keymaps.OLDER_ATTENTION.values()


def unet_names(unet: UNet) -> dict[str, str]:
    """Native parameter -> name in the file."""
    table = keymaps.unet(unet.spec)
    return {key: keymaps.rename(key, table) for key in unet.state_dict()}


def autoencoder_names(autoencoder: Autoencoder) -> dict[str, str]:
    """Native parameter -> name in the file."""
    table = keymaps.autoencoder(autoencoder.spec)
    return {key: keymaps.rename(key, table) for key in autoencoder.state_dict()}


def text_names(text: TextEncoder) -> dict[str, str]:
    """Parameter of `transformers`' class -> name in the file, without the prefix that some versions add."""
    return {key: key.removeprefix(keymaps.TEXT_PREFIX) for key in text.transformer.state_dict()}


def assign(
    network: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Give a network on the meta device its weights; names: native -> file. Strict."""
    shapes = {names[key]: value.shape for key, value in network.state_dict().items()}
    refuse("missing", [key for key in shapes if key not in tensors], network)
    refuse("unexpected", [key for key in tensors if key not in shapes], network)
    misshaped = [
        f"{key} {tuple(tensors[key].shape)} (expected {tuple(shape)})"
        for key, shape in shapes.items()
        if tensors[key].shape != shape
    ]
    refuse("misshaped", misshaped, network)
    state = {key: tensors[name].to(dtype) for key, name in names.items()}
    network.load_state_dict(state, strict=True, assign=True)


def refuse(what: str, keys: list[str], network: nn.Module) -> None:
    """Raise CheckpointError that names the first few keys and counts the rest, if there are any."""
    if keys:
        raise CheckpointError(f"{type(network).__name__}: {listed(what, keys)}")


def listed(what: str, keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {what} keys: " + ", ".join(sorted(keys)[:SHOWN]) + more


def restore_positions(text: TextEncoder) -> None:
    """Make again the one buffer that files do not hold, and that the meta device left empty."""
    for module in text.modules():
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(text.spec.tokens)[None]


def read_autoencoder(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """Newer names, and the attention's linear matrices (C, C) as 1x1 convolutions (C, C, 1, 1)."""
    tensors = read_network(folder, NETWORK_FILES, allow_pickle)
    renamed = {keymaps.OLDER_ATTENTION.get(key, key): value for key, value in tensors.items()}
    return {
        key: value[:, :, None, None] if is_linear(key) and value.dim() == 2 else value
        for key, value in renamed.items()
    }


def read_text(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """Keys without the prefix, and without what holds nothing learned."""
    tensors = read_network(folder, TEXT_FILES, allow_pickle)
    bare = {key.removeprefix(keymaps.TEXT_PREFIX): value for key, value in tensors.items()}
    return {key: value for key, value in bare.items() if key not in keymaps.TEXT_IGNORED}


def read_network(folder: Path, names: tuple[str, ...], allow_pickle: bool) -> dict[str, Tensor]:
    """Every tensor of the first of these files that is there."""
    for name in names:
        if (folder / name).is_file():
            return read_safetensors(folder / name)
    pickled = folder / PICKLES[names]
    if not pickled.is_file():
        raise CheckpointError(f"{folder / names[0]} is missing")
    if not allow_pickle:
        raise CheckpointError(f"{folder} holds pickled weights only ({pickled.name}); they need allow_pickle")
    return read_pickle(pickled)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is corrupt or cut short: {error}") from error


class Inert:
    """Stands for every class a pickle names that is no tensor's: takes anything, does nothing."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of a pickle, alone or under `state_dict`, by a reader that runs no code.

    A trainer's other objects, which published files hold beside the weights, become inert.
    """
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in foreign(file)]):
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes led it to
        raise CheckpointError(f"{file} is corrupt or holds more than tensors") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file} holds something else than named tensors")
    return tensors


def foreign(file: Path) -> list[str]:
    """Names in a .ckpt file that torch's own reader of weights does not know; none of the older form."""
    if file.suffix != ".ckpt" or not zipfile.is_zipfile(file):
        return []
    return torch.serialization.get_unsafe_globals_in_checkpoint(file)


def read_tokenizer(folder: Path, spec: TextSpec) -> CLIPTokenizer:
    """The folder's own tokenizer, whose ids must all have a row in the embedding."""
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise CheckpointError(f"{folder / 'vocab.json'} is missing")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever the bytes led it to
        raise CheckpointError(f"{folder} cannot be read as a CLIP tokenizer: {error}") from error
    if len(tokenizer) > spec.vocabulary:
        raise CheckpointError(f"{folder} has {len(tokenizer)} tokens, the text encoder {spec.vocabulary}")
    return tokenizer

"""Checkpoints: a diffusers folder or a single CompVis file, read safely and loaded strictly.

Folders are written again.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertTokenizer, CLIPTokenizer

from models.checkpoint import text_tensors, tokenizers
from models.checkpoint.meta import shapes_only
from models.conditioning.conditioner import (
    Conditioner,
    LayoutProjection,
    TextConditioner,
    TokenConditioner,
    make_conditioner,
)
from models.conditioning.text_encoder import TextEncoder
from models.formats import companions, keymaps, ldm, single_file, stable_diffusion
from models.formats.config_files import read_json
from models.formats.diffusers_read import (
    TEXT_ENCODERS,
    TOKENIZERS,
    CheckpointError,
    autoencoder_folder,
    read_spec,
    write_configs,
)
from models.formats.safetensors import FLOATS, Stored
from models.latent_diffusion import LatentDiffusion, autoencoder_dtype
from models.networks.autoencoder import Autoencoder
from models.networks.unet import UNet
from models.spec import ModelSpec, Prediction, TextSpec, TokenSpec
from models.stopwatch import Stopwatch

__all__ = ["CheckpointError", "load", "read_spec", "save"]


class Names(NamedTuple):
    """What the files of a network are called, in safetensors and pickled."""

    safe: str
    pickled: str

    @property
    def whole(self) -> str:
        """The one file that we write."""
        return f"{self.safe}.safetensors"


NETWORK_FILES = Names("diffusion_pytorch_model", "diffusion_pytorch_model")
TEXT_FILES = Names("model", "pytorch_model")
VARIANTS = ("", ".fp16")
PROJECTION = "text_projection.weight"
INDEX = ".index.json"
SHOWN = 4  # keys named in an error, of however many
MIXED = ("float16", "bfloat16")  # of one size: a network that has both has a damaged header
ALIGNMENT = 64  # bytes; torch's own of memory and of .ckpt files, which safetensors files do not have


class Weights(NamedTuple):
    """A file's tensors: what they are is known, and each is read when it is asked for."""

    stored: Mapping[str, Stored]
    read: Callable[[str], Tensor]  # to the device, in the type that the file has

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Under other names, or some of them only; names: new -> old."""
        return Weights(
            {new: self.stored[old] for new, old in names.items()}, lambda new: self.read(names[new])
        )


class Part(NamedTuple):
    """A network on the meta device, and what its file holds for it."""

    network: nn.Module
    names: Mapping[str, str]  # native parameter -> name in the file
    weights: Weights


class Networks(NamedTuple):
    """Of a model; the tokenizer is missing."""

    unet: UNet | None
    autoencoder: Autoencoder
    conditioner: Conditioner | None


@dataclass(frozen=True)
class Opened:
    """A model on the meta device, and where its weights are: none is read yet."""

    spec: ModelSpec
    networks: Networks
    parts: tuple[Part, ...]
    rest: tuple[str, ...] = ()  # tensors of no network
    averaged: bool = False  # the UNet's weights are averages over its training
    copies: Mapping[str, str] | None = None  # a second first stage's tensors -> the first's
    weights: Weights | None = None  # of a single file, all


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    vocabulary: Path | None = None,
    watch: Stopwatch | None = None,
    prediction: Prediction | None = None,
) -> LatentDiffusion:
    """The model in a diffusers folder or in a single file, ready to run.

    Files are mapped: what no network takes is never read, and what one takes goes to its device tensor by
    tensor. On the CPU, weights of the file's own type may stay in the file: replace it, do not write into it.

    allow_pickle: read .bin files where there is no safetensors file, and .ckpt files; they never run code
    even then. vocabulary: BERT's vocab.txt or its folder, for a model that reads these words; if None, it is
    looked for beside the model and in the local Hugging Face cache. watch: takes the time of each part.
    prediction: as of read_spec(). Never touches the network. Raises CheckpointError with what is missing,
    unexpected, misshaped, mistyped or unreadable.
    """
    path, watch = Path(path), watch or Stopwatch()
    opened = open_model(path, device, allow_pickle, prediction)
    check(opened, path)
    watch.lap("headers")
    stage = autoencoder_dtype(opened.spec.autoencoder, dtype, device)
    for part in opened.parts:
        assign(part, stage if part.network is opened.networks.autoencoder else dtype)
        watch.lap(f"weights of {type(part.network).__name__}")
    give_tokenizer(opened, path, vocabulary)
    watch.lap("tokenizers")
    for network in filter(None, opened.networks):
        network.requires_grad_(False).eval()
    bundle = LatentDiffusion(opened.spec, *opened.networks).to(device)
    watch.lap("to the device")
    return bundle


def open_model(
    path: Path,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
    prediction: Prediction | None = None,
) -> Opened:
    """A model without its weights, which would go to that device. Raises CheckpointError."""
    spec = read_spec(path, allow_pickle, prediction)
    try:
        with shapes_only():
            networks = networks_of(spec)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{path}: networks of no known structure: {error}") from error
    if file := single_file.weights_of(path):
        opened = open_single(spec, networks, open_weights(file, device, allow_pickle))
        elsewhere = spec.texts and not stable_diffusion.places(opened.weights.stored)
        return with_text_parts(opened, file.parent, device, allow_pickle) if elsewhere else opened
    return open_folder(spec, networks, path, device, allow_pickle)


def networks_of(spec: ModelSpec) -> Networks:
    """As they are made, with initial values."""
    conditioner = make_conditioner(spec.condition)
    if spec.texts:
        channels = spec.layout_channels
        layout = LayoutProjection(spec.texts[0].width, channels) if channels else None
        encoders = [TextEncoder(text, None) for text in spec.texts]
        conditioner = TextConditioner(encoders, layout, spec.labels, spec.zero_null)
    return Networks(UNet(spec.unet) if spec.unet else None, Autoencoder(spec.autoencoder), conditioner)


def weights_in(spec: ModelSpec) -> int:
    """How many numbers the networks of a model hold, without making them."""
    with shapes_only():
        networks = networks_of(spec)
    return sum(weight.numel() for network in filter(None, networks) for weight in network.parameters())


def open_folder(
    spec: ModelSpec, networks: Networks, path: Path, device: torch.device | str, allow_pickle: bool
) -> Opened:
    """A model in a diffusers folder."""
    unet, autoencoder, conditioner = networks
    read = partial(open_network, device=device, allow_pickle=allow_pickle)
    parts = [
        Part(unet, unet_names(unet), read(path / "unet", NETWORK_FILES)),
        Part(
            autoencoder, autoencoder_names(autoencoder), newer(read(autoencoder_folder(path), NETWORK_FILES))
        ),
    ]
    for encoder, folder in zip(conditioner.encoders if conditioner else (), TEXT_ENCODERS, strict=False):
        parts.append(Part(encoder, text_names(encoder), bare(read(path / folder, TEXT_FILES))))
    if layout := conditioner and conditioner.layout:
        names = {key: key for key in layout.state_dict()}
        parts.append(Part(layout, names, read(path / "layout", NETWORK_FILES)))
    return Opened(spec, networks, tuple(parts))


def open_single(spec: ModelSpec, networks: Networks, weights: Weights) -> Opened:
    """A model in a single file of the CompVis layout, or a first stage alone."""
    copies = copies_in(weights.stored)
    left = {key for key in weights.stored if not keymaps.is_ignored(key)} - copies.keys()
    texts = text_parts(spec, networks, weights, left)
    found, averages = [], set()  # network, its names, the file's tensors for it
    if networks.unet:
        names = {key: ldm.UNET + key for key in networks.unet.state_dict()}
        averages = {key for key in left if key.startswith(keymaps.EMA)}
        if averages:  # then all, in the place of the last ones
            left -= set(names.values())
            names = {key: keymaps.averaged(name) for key, name in names.items()}
        found.append((networks.unet, names, averages | {key for key in left if key.startswith(ldm.UNET)}))
    stage = ldm.FIRST_STAGE if networks.unet else ""
    own = networks.conditioner if spec.condition else None
    for network, prefix in ((own, ldm.CONDITION), (networks.autoencoder, stage)):
        if network:
            names = {key: prefix + key for key in network.state_dict()}
            found.append((network, names, {key for key in left if key.startswith(prefix)}))
    parts = tuple(Part(n, names, weights.renamed({key: key for key in own})) for n, names, own in found)
    parts += texts
    rest = left.difference(*(part.weights.stored for part in parts))
    return Opened(spec, networks, parts, tuple(sorted(rest)), bool(averages), copies, weights)


def text_parts(spec: ModelSpec, networks: Networks, weights: Weights, left: set[str]) -> tuple[Part, ...]:
    """The text encoders in a file; their tensors are taken out of what is left."""
    parts = []
    for place, encoder in zip(
        stable_diffusion.places(left), networks.conditioner.encoders if spec.texts else (), strict=False
    ):
        own = {key for key in left if key.startswith(place.prefix)}
        left -= own
        own = {key: key for key in own if not text_tensors.unused(key, encoder, place)}
        held = weights.renamed(own)
        held = Weights(*text_tensors.in_pieces(held.stored, held.read)) if place.open_clip else held
        parts.append(Part(encoder, text_tensors.names_of(encoder, place, own), held))
    return tuple(parts)


def with_text_parts(opened: Opened, folder: Path, device: torch.device | str, allow_pickle: bool) -> Opened:
    """A model in a single file with CLIP's text encoder and projection from the folder that it lies in."""
    text, folder = opened.networks.conditioner.encoders[0], folder / "text_encoder"
    weights = bare(open_network(folder, TEXT_FILES, device, allow_pickle))
    # A whole CLIP has more than text.
    ours = [key for key in weights.stored if not key.startswith(keymaps.CLIP_PICTURES)]
    if PROJECTION not in ours:
        raise CheckpointError(
            f"{folder} has no {PROJECTION}; expected CLIP's text encoder with its projection"
        )
    part = Part(text, text_names(text), weights.renamed({key: key for key in ours}))
    return replace(opened, parts=(*opened.parts, part))


def copies_in(stored: Mapping[str, Stored]) -> dict[str, str]:
    """The first stage's second copy, which models of masked pictures hold as their conditioner."""
    if ldm.CONDITION + "encoder.conv_in.weight" not in stored:
        return {}
    return {
        key: ldm.FIRST_STAGE + key.removeprefix(ldm.CONDITION)
        for key in stored
        if key.startswith(ldm.CONDITION) and not keymaps.is_ignored(key)
    }


def check(opened: Opened, path: Path) -> None:
    """Raise CheckpointError unless every network has what it takes and nothing is left."""
    for part in opened.parts:
        for what, keys in faults(part).items():
            if keys:
                raise CheckpointError(f"{type(part.network).__name__}: {listed(what, keys)}")
    if opened.rest:
        raise CheckpointError(f"{path}: {listed('unexpected', list(opened.rest))}")
    check_copies(opened)


def check_copies(opened: Opened) -> None:
    """Raise CheckpointError where what should be a copy is another first stage."""
    for copy, key in (opened.copies or {}).items():
        weights = opened.weights
        if key not in weights.stored or not torch.equal(weights.read(copy), weights.read(key)):
            raise CheckpointError(f"{copy} differs from {key}: the conditioner is another first stage")


def open_weights(file: Path, device: torch.device | str, allow_pickle: bool) -> Weights:
    """The tensors of one file. Raises CheckpointError, also for a pickled one that is not allowed."""
    stored = single_file.read_header(file, allow_pickle)
    if file.suffix == ".safetensors":
        with translated(file):
            tensors = safe_open(file, framework="pt", device=str(device))
        return Weights(stored, partial(read_mapped, file, tensors))
    with translated(file), file.open("rb") as stream:
        # Private: what is written to a tensor does not reach the file.
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return Weights(stored, lambda name: tensor_in(data, stored[name]).to(device))


@contextmanager
def translated(file: Path) -> Iterator[None]:
    """What goes wrong with a file, as CheckpointError."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is corrupt or cut short: {error}") from error


def read_mapped(file: Path, tensors: safe_open, name: str) -> Tensor:
    with translated(file):
        return tensors.get_tensor(name)


def tensor_in(data: mmap.mmap, stored: Stored) -> Tensor:
    """A view of a mapped file; a copy where the tensor has gaps or lies between two numbers."""
    dtype, start = getattr(torch, stored.dtype), stored.start
    if not stored.extent:
        return torch.empty(stored.shape, dtype=dtype)
    if start % dtype.itemsize:
        data, start = bytearray(data[start : start + stored.extent]), 0
    flat = torch.frombuffer(data, dtype=dtype, count=stored.extent // dtype.itemsize, offset=start)
    return flat.as_strided(stored.shape, stored.stride).contiguous()


def give_tokenizer(opened: Opened, path: Path, vocabulary: Path | None) -> None:
    """A text conditioner's tokenizer, which is in no file of weights."""
    spec, conditioner = opened.spec, opened.networks.conditioner
    if spec.texts and opened.weights and stable_diffusion.places(opened.weights.stored):
        for encoder in conditioner.encoders:
            text = encoder.spec
            encoder.tokenizer = tokenizers.clip(None if text.pad_id == text.eos_id else text.pad_id)
    elif spec.texts:
        folder = path if path.is_dir() else path.parent
        for encoder, name in zip(conditioner.encoders, TOKENIZERS, strict=False):
            encoder.tokenizer = read_tokenizer(folder / name, encoder.spec)
    elif isinstance(conditioner, TokenConditioner) and (file := companions.find(path, vocabulary)):
        conditioner.tokenizer = read_words(file, spec.condition)


def words_beside(path: Path) -> Path:
    """Where BERT's words would be."""
    return (path if path.is_dir() else path.parent) / "vocab.txt"


def read_words(file: Path, spec: TokenSpec) -> BertTokenizer:
    """BERT's words, whose ids must all have a row in the embedding."""
    try:
        tokenizer = BertTokenizer.from_pretrained(file.parent, local_files_only=True)
    except Exception as error:  # transformers raises whatever the bytes led it to
        raise CheckpointError(f"{file} cannot be read as BERT's vocabulary: {error}") from error
    if len(tokenizer) > spec.vocabulary:
        raise CheckpointError(f"{file} has {len(tokenizer)} tokens, the text encoder {spec.vocabulary}")
    return tokenizer


def save(
    bundle: LatentDiffusion, path: str | Path, dtype: torch.dtype = torch.float16, shard: int | None = None
) -> None:
    """Write a bundle as a diffusers folder that diffusers itself can load, weights in `dtype`.

    shard: the most bytes of a file; a network that takes more gets several, and an index. Raises
    CheckpointError for a value that dtype cannot hold, or a shape the layout has no words for.
    """
    path = Path(path)
    check_writable(bundle)
    write_configs(bundle.spec, path)
    folder, conditioner = autoencoder_folder(path), bundle.conditioner
    write = partial(write_network, dtype=dtype, shard=shard)
    write(named(bundle.unet, unet_names), path / "unet", NETWORK_FILES)
    write(named(bundle.autoencoder, autoencoder_names), folder, NETWORK_FILES)
    if not conditioner:
        return
    for encoder, text, tokenizer in zip(conditioner.encoders, TEXT_ENCODERS, TOKENIZERS, strict=False):
        encoder.tokenizer.save_pretrained(path / tokenizer)
        write(named(encoder, published_text_names), path / text, TEXT_FILES)
    if conditioner.layout:
        write(conditioner.layout.state_dict(), path / "layout", NETWORK_FILES)


def write_network(
    tensors: Mapping[str, Tensor], folder: Path, names: Names, dtype: torch.dtype, shard: int | None
) -> None:
    """One file, or several with an index where one would have more than `shard` bytes."""
    parts = split(tensors, dtype, shard)
    if len(parts) == 1:
        write_tensors(tensors, folder / names.whole, dtype)
        return
    (folder / names.whole).unlink(missing_ok=True)  # of another time: it would be read in their place
    files = {}  # tensor -> its file
    for number, part in enumerate(parts, 1):
        name = f"{names.safe}-{number:05}-of-{len(parts):05}.safetensors"
        write_tensors({key: tensors[key] for key in part}, folder / name, dtype)
        files |= dict.fromkeys(part, name)
    total = sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / (names.whole + INDEX)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def split(tensors: Mapping[str, Tensor], dtype: torch.dtype, most: int | None) -> list[list[str]]:
    """Names in files of at most so many bytes, in their order; a larger tensor has a file of its own."""
    parts, left = [[]], most
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if most and size > left and parts[-1]:
            parts.append([])
            left = most
        parts[-1].append(name)
        left = left and left - size
    return parts


def check_writable(bundle: LatentDiffusion) -> None:
    """Raise CheckpointError for a model that the layout has no words for."""
    unet, autoencoder, conditioner = bundle.spec.unet, bundle.spec.autoencoder, bundle.conditioner
    texts = isinstance(conditioner, TextConditioner) and unet and unet.context_width
    if not texts and (conditioner or not bundle.spec.upscaling):
        raise CheckpointError("this layout holds models with CLIP's text encoder, and upscalers without text")
    check_texts(bundle.spec)
    if unet.residual_resampling or unet.scale_shift_norm:
        raise CheckpointError("this layout cannot say how the UNet resamples or norms")
    if autoencoder.codes or autoencoder.attention_levels:
        raise CheckpointError("this layout holds KL autoencoders with attention in the middle only")


def check_texts(spec: ModelSpec) -> None:
    """Raise CheckpointError for text encoders that are not used as in any of the layout's pipelines."""
    several = len(spec.texts) > 1
    for index, text in enumerate(spec.texts):
        inner = text.skipped == 1 and not text.final_norm
        whole = not text.skipped and text.final_norm
        pooled = bool(text.pooled) == (several and index == 1)
        if index > 1 or text.projection or not pooled or not (inner if several else whole):
            raise CheckpointError("this layout cannot say how the text encoders' vectors are used")
    if spec.zero_null and spec.texts and not several:
        raise CheckpointError("this layout cannot say that guidance compares with zeros")


def named(network: nn.Module, names_of: Callable[[nn.Module], dict[str, str]]) -> dict[str, Tensor]:
    """A network's tensors under their names in the file."""
    names = names_of(network)
    return {names[key]: value for key, value in network.state_dict().items()}


def write_tensors(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None) -> None:
    """dtype: None for each tensor's own.

    Attention matrices of the autoencoder lose their two trailing axes of 1: the layout has them linear.
    """
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.flatten(1) if is_linear(name) and tensor.dim() == 4 else tensor
        # Not even a view may share memory with another tensor in the file.
        out[name] = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        if not torch.isfinite(out[name]).all():
            raise CheckpointError(f"{name} has values that {out[name].dtype} cannot hold")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    mode = file.stat().st_mode
    save_file(out, file, metadata={"format": "pt"})
    file.chmod(mode)  # the library's is for its owner only


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
    """Native parameter -> name in the file, without the prefix that published ones have."""
    return {key: key.removeprefix("transformer.") for key in text.state_dict()}


def published_text_names(text: TextEncoder) -> dict[str, str]:
    """Native parameter -> name in the file."""
    return {
        key: name if name == PROJECTION else keymaps.TEXT_PREFIX + name
        for key, name in text_names(text).items()
    }


def assign(part: Part, dtype: torch.dtype) -> None:
    """Give a network on the meta device its weights, after check()."""
    state = {}
    for key, value in part.network.state_dict().items():
        tensor = part.weights.read(part.names[key])  # already on its device: the type changes there
        state[key] = aligned(tensor.to(dtype)).reshape(value.shape)
    part.network.load_state_dict(state, strict=True, assign=True)


def aligned(tensor: Tensor) -> Tensor:
    """On the CPU, at an address that kernels like: else the last bits would depend on the file."""
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT else tensor


def faults(part: Part) -> dict[str, list[str]]:
    """What is wrong with a network's tensors in its file: kind of fault -> names."""
    stored = part.weights.stored
    shapes = {part.names[key]: tuple(value.shape) for key, value in part.network.state_dict().items()}
    there = {key: stored[key] for key in shapes if key in stored}
    counts = [sum(entry.dtype == name for entry in there.values()) for name in MIXED]
    odd = MIXED[counts.index(min(counts))] if min(counts) else None
    accepted = [name for name in FLOATS if name != odd]
    misshaped = {key: entry.shape for key, entry in there.items() if entry.shape != shapes[key]}
    return {
        "missing": [key for key in shapes if key not in stored],
        "unexpected": [key for key in stored if key not in shapes],
        "misshaped": [f"{key} {shape} (expected {shapes[key]})" for key, shape in misshaped.items()],
        "mistyped": [f"{key} {entry.dtype}" for key, entry in there.items() if entry.dtype not in accepted],
    }


def listed(what: str, keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {what} keys: " + ", ".join(sorted(keys)[:SHOWN]) + more


def newer(weights: Weights) -> Weights:
    """Newer names, and the attention's linear matrices (C, C) as 1x1 convolutions (C, C, 1, 1)."""
    named = weights.renamed({keymaps.OLDER_ATTENTION.get(key, key): key for key in weights.stored})
    shaped = {
        key: replace(entry, shape=(*entry.shape, 1, 1)) if is_linear(key) and len(entry.shape) == 2 else entry
        for key, entry in named.stored.items()
    }
    return Weights(shaped, named.read)


def bare(weights: Weights) -> Weights:
    """Keys without the prefix, and without what holds nothing learned."""
    names = {key.removeprefix(keymaps.TEXT_PREFIX): key for key in weights.stored}
    return weights.renamed({new: old for new, old in names.items() if new not in keymaps.TEXT_IGNORED})


def open_network(folder: Path, names: Names, device: torch.device | str, allow_pickle: bool) -> Weights:
    """The first of a network's files, or of the indexes of several, that is there; pickled ones last."""
    for stem, suffix in ((names.safe, ".safetensors"), (names.pickled, ".bin")):
        for variant in VARIANTS:
            file = folder / f"{stem}{variant}{suffix}"
            # Older files have the variant at the end.
            indexes = [folder / f"{stem}{suffix}.index{variant}.json", file.with_name(file.name + INDEX)]
            index = next((index for index in indexes if index.is_file()), None)
            if not file.is_file() and index is None:
                continue
            if suffix == ".bin" and not allow_pickle:
                found = (index or file).name
                raise CheckpointError(
                    f"{folder} holds pickled weights only ({found}); they need allow_pickle"
                )
            if file.is_file():
                return open_weights(file, device, allow_pickle)
            return open_shards(index, suffix, device, allow_pickle)
    raise CheckpointError(f"{folder / names.whole} is missing")


def open_shards(index: Path, suffix: str, device: torch.device | str, allow_pickle: bool) -> Weights:
    """The tensors of a network in several files, beside an index that says which is where."""
    files = read_json(index).get("weight_map")
    names = set(files.values()) if isinstance(files, dict) and files else {None}
    for name in names:
        # A name with a folder in it could lead anywhere.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(f"{index}: weight_map must name {suffix} files beside it, not {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing; {index.name} names it")
    shards = {name: open_weights(index.parent / name, device, allow_pickle) for name in sorted(names)}
    where = {key: name for name, shard in shards.items() for key in shard.stored}
    if where != files:
        wrong = [key for key in {**files, **where} if where.get(key) != files.get(key)]
        raise CheckpointError(f"{index} does not say what its files hold: {listed('other', wrong)}")
    stored = {key: shards[name].stored[key] for key, name in where.items()}
    return Weights(stored, lambda key: shards[where[key]].read(key))


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

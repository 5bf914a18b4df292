"""Saves a model as a diffusers folder that diffusers itself can load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoint.parts import (
    autoencoder_names,
    is_attention_matrix,
    prefixed_text_names,
    unet_names,
)
from models.checkpoint.weights import INDEX_SUFFIX, NETWORK_FILES, TEXT_FILES, FileNames
from models.conditioning.conditioner import TextConditioner
from models.errors import CheckpointError
from models.formats.diffusers_read import autoencoder_folder
from models.formats.diffusers_tables import TEXT_ENCODERS, TOKENIZERS
from models.formats.diffusers_write import write_configs
from models.latent_diffusion import LatentDiffusion
from models.spec import ModelSpec


def save(
    model: LatentDiffusion,
    path: str | Path,
    dtype: torch.dtype = torch.float16,
    shard: int | None = None,
) -> None:
    """Write a model as a diffusers folder, weights in `dtype`.

    shard: maximum bytes of a file; a larger network gets several files and an index. Raises CheckpointError
    for a value that dtype cannot represent, or a model that the layout cannot describe.
    """
    path = Path(path)
    check_writable(model)
    assert model.unet is not None
    write_configs(model.spec, path)
    folder, conditioner = autoencoder_folder(path), model.conditioner
    write = partial(write_network, dtype=dtype, shard=shard)
    write(renamed(model.unet, unet_names(model.unet)), path / "unet", NETWORK_FILES)
    write(renamed(model.autoencoder, autoencoder_names(model.autoencoder)), folder, NETWORK_FILES)
    if not isinstance(conditioner, TextConditioner):
        return
    for encoder, number in zip(conditioner.encoders, model.spec.encoder_numbers, strict=True):
        if encoder.tokenizer is None:
            raise CheckpointError("a text encoder has no tokenizer to save")
        encoder.tokenizer.save_pretrained(path / TOKENIZERS[number])
        write(renamed(encoder, prefixed_text_names(encoder)), path / TEXT_ENCODERS[number], TEXT_FILES)
    if conditioner.layout:
        write(conditioner.layout.state_dict(), path / "layout", NETWORK_FILES)


def renamed(network: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """A network's tensors; names: native parameter -> name in the file."""
    return {names[key]: value for key, value in network.state_dict().items()}


def check_writable(model: LatentDiffusion) -> None:
    """Raise CheckpointError for a model that the layout cannot describe."""
    unet, autoencoder, conditioner = model.spec.unet, model.spec.autoencoder, model.conditioner
    texts = isinstance(conditioner, TextConditioner) and unet and unet.context_width
    if unet is None or (not texts and (conditioner or not model.spec.upscaling)):
        raise CheckpointError(
            "the diffusers layout supports models with CLIP's text encoder, and upscalers without text, only"
        )
    check_texts(model.spec)
    if unet.residual_resampling or unet.scale_shift_norm:
        raise CheckpointError("the diffusers layout does not support this UNet's resampling or norms")
    if autoencoder.codes or autoencoder.attention_levels:
        raise CheckpointError(
            "the diffusers layout supports KL autoencoders with attention in the middle block only"
        )


def check_texts(spec: ModelSpec) -> None:
    """Raise CheckpointError for text encoders that no pipeline of the layout uses in this way."""
    several = len(spec.texts) > 1 or spec.aesthetic_score
    for index, text in zip(spec.encoder_numbers, spec.texts, strict=True):
        inner = text.skipped == 1 and not text.final_norm
        complete = not text.skipped and text.final_norm
        pooled = bool(text.pooled) == (several and index == 1)
        if index > 1 or text.projection or not pooled or not (inner if several else complete):
            raise CheckpointError("the diffusers layout does not support this use of the text encoders")
    if spec.zero_null and spec.texts and not several:
        raise CheckpointError("the diffusers layout does not support guidance against a context of zeros")


def write_network(
    tensors: Mapping[str, Tensor], folder: Path, names: FileNames, dtype: torch.dtype, shard: int | None
) -> None:
    """Write one file, or several with an index if one would have more than `shard` bytes."""
    groups = split_by_size(tensors, dtype, shard)
    if len(groups) == 1:
        write_tensors(tensors, folder / names.safe_file, dtype)
        return
    (folder / names.safe_file).unlink(missing_ok=True)  # a file of an earlier save would be read first
    files: dict[str, str] = {}  # tensor -> its file
    for number, group in enumerate(groups, 1):
        name = f"{names.safe}-{number:05}-of-{len(groups):05}.safetensors"
        write_tensors({key: tensors[key] for key in group}, folder / name, dtype)
        files |= dict.fromkeys(group, name)
    total = sum(tensor.numel() * dtype.itemsize for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    text = json.dumps(index, indent=2) + "\n"
    (folder / (names.safe_file + INDEX_SUFFIX)).write_text(text, encoding="utf-8")


def split_by_size(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, max_bytes: int | None
) -> list[list[str]]:
    """Names in groups of at most max_bytes, in their order; a larger tensor is a group alone."""
    groups: list[list[str]] = [[]]
    left = max_bytes or 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if max_bytes and size > left and groups[-1]:
            groups.append([])
            left = max_bytes
        groups[-1].append(name)
        left -= size
    return groups


def write_tensors(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None) -> None:
    """Write a safetensors file; dtype: None for each tensor's own.

    Attention matrices of the autoencoder lose their two trailing axes of 1: they are linear in the layout.
    """
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.flatten(1) if is_attention_matrix(name) and tensor.dim() == 4 else tensor
        # safetensors refuses tensors that share memory, also as views.
        out[name] = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        if not torch.isfinite(out[name]).all():
            raise CheckpointError(f"{name} has values that {out[name].dtype} cannot represent")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    mode = file.stat().st_mode
    save_file(out, file, metadata={"format": "pt"})
    file.chmod(mode)  # the library writes files that only their owner can read
